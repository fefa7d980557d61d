"""Helpers that benchmarks, scripts and tests share."""
