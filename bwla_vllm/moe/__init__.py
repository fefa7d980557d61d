"""The one-bit experts of a mixture-of-experts layer in vLLM."""
