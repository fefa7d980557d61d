"""Placeholder tensors for `--load-format dummy`: vLLM's random values are not valid rotations."""

import functools
from typing import Any

import torch
from bwla_kernels.format import LayerSpec, tensor_specs
from bwla_kernels.format.layer import ROW_TENSORS
from torch import Tensor

SEED = 0


def loads_dummy_weights(config: Any) -> bool:
    """Return whether vLLM's config (None outside an engine) has `--load-format dummy`."""
    return config is not None and str(config.load_config.load_format) == "dummy"


@functools.lru_cache(maxsize=8)
def _signs(shape: tuple[int, ...]) -> Tensor:
    """Return random packed signs, drawn once for all layers of a shape: a large model has hundreds."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, device="cpu").to(torch.int32)


def dummy_tensors(spec: LayerSpec, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a valid layer of the sizes of `spec`, the same in every process.

    Random signs, identity rotations, a row scale that preserves the variance, and a correction of zeros: suitable for
    measuring speed and memory, and finite at any depth.
    """
    tensors = {}
    for name, want in tensor_specs(spec).items():
        dtype = want.dtypes[0]
        if name == "weight_packed":
            tensor = _signs(tuple(want.shape)).to(dtype, copy=True)
        elif name in ("rotation_left", "rotation_right"):
            tensor = torch.eye(want.shape[-1], dtype=dtype, device="cpu").repeat(want.shape[0], 1, 1)
        elif name == "column_scale":
            tensor = torch.ones(want.shape, dtype=dtype, device="cpu")
        elif name == "weight_scale":
            tensor = torch.full(want.shape, spec.in_features**-0.5, dtype=dtype, device="cpu")
        else:
            tensor = torch.zeros(want.shape, dtype=dtype, device="cpu")
        tensors[name] = tensor.to(device)
    return tensors


def dummy_experts(experts: int, spec: LayerSpec, device: torch.device) -> dict[str, Tensor]:
    """Return the stacked tensors of one projection of a layer's experts, which are all the same (`dummy_tensors`)."""
    return {
        name: tensor.repeat(experts, *[1] * tensor.dim()) if name in ROW_TENSORS else tensor
        for name, tensor in dummy_tensors(spec, device).items()
    }
