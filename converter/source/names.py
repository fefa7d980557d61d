"""Names of modules and tensors that every supported architecture shares."""

from bwla_kernels.format.head import HEAD_MODULE

HEAD_WEIGHT = f"{HEAD_MODULE}.weight"


EMBEDDING_WEIGHT = "model.embed_tokens.weight"


FINAL_NORM = "model.norm"
