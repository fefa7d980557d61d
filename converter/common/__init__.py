"""Helpers that know nothing of quantization: files, devices, versions, generic tensor functions."""
