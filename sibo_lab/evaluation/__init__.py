"""Scores of a model, and of many runs side by side."""
