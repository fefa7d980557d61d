"""The example model, its text, and the script that trained it."""
