"""The quantization mathematics: OKT, PSP, signs, scales; pure functions from weights to stored tensors."""
