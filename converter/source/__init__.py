"""The model to convert: its files, its family, the names and dtypes of its tensors."""
