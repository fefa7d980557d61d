"""Calibration text, and the loop in which its hidden states run through the decoder layers."""
