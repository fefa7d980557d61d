"""Evaluation of checkpoints: perplexity on text."""
