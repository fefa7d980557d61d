"""Which architectures are converted and served: tiny random models of all of them, through converter and vLLM."""
