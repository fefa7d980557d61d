"""Seeded random tensors for tests: plain ones, rotations, and whole layers in the stored format."""

import torch
from bwla_kernels.format import LayerSpec, pack_signs, tensor_specs, to_storage_dtype
from torch import Tensor


def make_generator(seed: int = 0) -> torch.Generator:
    """Return a CPU generator with this seed."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Return standard normal float32 values of this shape."""
    return torch.randn(*shape, generator=make_generator(seed))


def random_rotation(groups: int, order: int, generator: torch.Generator) -> Tensor:
    """Return orthogonal matrices, float64 [G, order, order]."""
    square = torch.randn(groups, order, order, generator=generator, dtype=torch.float64)
    orthogonal: Tensor = torch.linalg.qr(square).Q
    return orthogonal


def random_layer(spec: LayerSpec, seed: int = 0) -> dict[str, Tensor]:
    """Return a valid layer with random contents, in the stored dtypes; scales of groups are float16."""
    generator = make_generator(seed)
    n, k, r = spec.out_features, spec.in_features, spec.rank
    row = (n,) if spec.planes == 1 else (n, spec.planes)
    tensors = {"weight_packed": pack_signs(torch.randint(0, 2, (*row, k), generator=generator))}
    scales = torch.rand(tensor_specs(spec)["weight_scale"].shape, generator=generator) / k**0.5 + 0.01
    tensors["weight_scale"] = scales.half() if spec.grouped else scales
    if not spec.grouped:
        tensors |= {
            "rotation_left": random_rotation(spec.rotation_groups, spec.n1, generator),
            "rotation_right": random_rotation(spec.rotation_groups, spec.n2, generator),
            "column_scale": torch.rand(k, generator=generator) + 0.5,
        }
    if r:
        tensors["low_rank_a"] = torch.randn(r, k, generator=generator) / k**0.5
        tensors["low_rank_b"] = torch.randn(n, r, generator=generator)
    if spec.bias:
        tensors["bias"] = torch.randn(n, generator=generator)
    return to_storage_dtype(tensors, spec)
