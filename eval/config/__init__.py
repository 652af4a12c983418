"""Configurations of runs: YAML with lines, checked before any weight is read."""
