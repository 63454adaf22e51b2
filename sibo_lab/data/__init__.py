"""Tasks: from the benchmarks' files, or your own, to batches of token ids."""
