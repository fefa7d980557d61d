"""Helpers below all other packages: files, devices, versions, durations, sizes, generic tensor functions."""
