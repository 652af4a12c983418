"""Evaluation through lmms-eval: the model it finds, the plan of a run, its cells and their store."""
