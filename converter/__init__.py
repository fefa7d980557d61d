"""Offline conversion of a Hugging Face checkpoint into a BWLA checkpoint."""
