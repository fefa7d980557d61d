"""The CPU kernel: table-lookup matmul of one-bit weights, one C++ source with a plain C ABI."""
