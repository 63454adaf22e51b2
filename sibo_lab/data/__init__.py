"""Tasks: from the files of the benchmarks, or your own, to batches of token ids."""
