"""Perplexity of checkpoints on text."""
