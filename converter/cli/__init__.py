"""The commands `bwla-convert`, `bwla-eval` and `bwla-inspect`."""
