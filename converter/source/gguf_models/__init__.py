"""What llama.cpp's converter makes of each architecture: its settings and its tensors, and how both are undone."""
