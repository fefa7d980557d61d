"""Names of modules and tensors that all supported architectures share."""

from bwla_kernels.format.head import HEAD_MODULE

HEAD_WEIGHT = f"{HEAD_MODULE}.weight"
EMBEDDING_WEIGHT = "model.embed_tokens.weight"
FINAL_NORM = "model.norm"
