"""Calibration text, the hidden states it gives, and the layers that it runs through."""
