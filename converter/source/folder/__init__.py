"""What a model's folder or repository holds: its weights, the files beside them, and the names of its tensors."""
