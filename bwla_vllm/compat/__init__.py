"""What differs between the releases of vLLM and Triton, and what the plugin mends in some of them."""
