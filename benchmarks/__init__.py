"""Benchmarks, in a folder for each question; run from the repository root as `python -m benchmarks.FOLDER.NAME`."""
