"""BWLA checkpoints on disk: writing, reading, checking, dequantizing, publishing."""
