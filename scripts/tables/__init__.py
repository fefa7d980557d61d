"""The tables of the documentation, from result files."""
