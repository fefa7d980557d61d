"""The recipes `data-free`, `paper`, `fast` and `best`: what is done to each decoder layer, and what it costs."""
