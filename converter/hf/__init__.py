"""Load BWLA checkpoints with transformers; importing `bwla_converter.hf` registers the format."""
