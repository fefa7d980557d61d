"""The benchmarks import the Triton kernels: interpreted ones, as the kernels' tests need them in the same process."""

from interpreted import pytest_collection_finish

__all__ = ["pytest_collection_finish"]
