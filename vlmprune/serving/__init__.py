"""Pruned models in vLLM: a plugin of its own architectures, made of vLLM's classes and the same methods."""
