"""Tests of the three packages, the benchmarks, the scripts and the documents."""
