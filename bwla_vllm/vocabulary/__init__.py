"""The vocabulary in vLLM: the language-model head, in 8 bits or in binary planes, and the 8-bit embedding."""
