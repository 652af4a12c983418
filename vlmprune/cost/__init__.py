"""What a prefill costs by arithmetic: tokens of every layer, FLOPs, bytes in the cache."""
