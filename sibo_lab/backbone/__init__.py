"""Frozen models: where their files are, what these hold, and the tokenizers that belong to them."""
