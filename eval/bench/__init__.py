"""Where the milliseconds of a pruned model go: shapes, the oracle, stages, paired timing, tables."""
