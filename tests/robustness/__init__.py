"""Damaged folders and killed processes: short tests, and long runs from the command line."""
