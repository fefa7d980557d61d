"""How fast and how reliable vLLM is when it serves a converted model."""
