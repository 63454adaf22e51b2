"""Frozen models: where their files are, what these hold, and their tokenizers."""
