"""One training run: its options, its loop, its folder."""
