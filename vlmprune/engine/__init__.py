"""Hooks that act on one model instance: what is seen, where tokens go, and what a call on a pruned cache means."""
