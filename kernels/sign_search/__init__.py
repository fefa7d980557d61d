"""One-bit GPTQ: signs and row scales for a weight, chosen for a small output error.

`search` is the algorithm, `steps` its work within a block of columns as ops with a reference implementation, `metric`
what the error is measured with, `products` the matrix products between blocks.
"""

from bwla_kernels.sign_search.metric import Metric, Target
from bwla_kernels.sign_search.search import BinaryWeight, Effort, gptq_binarize, row_chunk_elements

__all__ = ["BinaryWeight", "Effort", "Metric", "Target", "gptq_binarize", "row_chunk_elements"]
