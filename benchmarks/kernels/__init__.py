"""How fast one layer is, on a CPU and on a GPU."""
