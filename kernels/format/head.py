"""The stored 8-bit language-model head and 8-bit embedding, which have the same tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format.layer import TensorSpec, shape_problem, value_problem
from torch import Tensor

HEAD_MODULE = "lm_head"
"""Module path of the head in every supported model family."""

EMBEDDING_MODULE = "model.embed_tokens"
"""Module path of the embedding in every supported model family."""

INT8_SUFFIX = ".weight_int8"
"""End of the name of the codes."""


@dataclass(frozen=True)
class HeadSpec:
    """Sizes of a head or an embedding: `out_features` V (the vocabulary), `in_features` K."""

    out_features: int
    in_features: int


def head_tensor_specs(spec: HeadSpec) -> dict[str, TensorSpec]:
    """Return the tensors stored under `lm_head.` or `model.embed_tokens.`.

    The name `weight_int8` keeps loaders from taking the codes for weights.
    """
    return {
        "weight_int8": TensorSpec((spec.out_features, spec.in_features), (torch.int8,)),
        "weight_scale": TensorSpec((spec.out_features,), (torch.float32,)),
    }


def validate_head(tensors: Mapping[str, Tensor], spec: HeadSpec, module: str = HEAD_MODULE) -> None:
    """Check the tensors of a loaded head or embedding; `module` is its module path, for messages.

    Raises:
        FormatError: missing or misshapen tensors, wrong dtypes, scales that are not finite and positive.
    """
    for key, want in head_tensor_specs(spec).items():
        name = f"{module}.{key}"
        if key not in tensors:
            raise FormatError(f"{name}: expected {want}, found no such tensor; convert the model again")
        tensor = tensors[key]
        problem = shape_problem(want, tuple(tensor.shape), tensor.dtype) or value_problem(key, tensor)
        if problem:
            raise FormatError(f"{name}: {problem}; convert or download the model again")
