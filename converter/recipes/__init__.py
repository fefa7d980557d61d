"""The recipes `paper`, `fast` and `best`: what is done to each decoder layer, in which order."""
