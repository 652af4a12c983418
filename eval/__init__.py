"""Evaluation, benchmarks, reports and the embedded models; installed as ``vlmprune.eval``."""
