"""Triton kernels for NVIDIA GPUs: the input side, the binary matmul, and their ahead-of-time checks."""
