"""Triton kernels for NVIDIA GPUs: input transform, binary GEMM, 8-bit head, and ahead-of-time checks."""
