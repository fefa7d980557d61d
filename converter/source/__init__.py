"""The model to convert: its folder, its architecture, the names and dtypes of its tensors."""
