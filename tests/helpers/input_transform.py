"""Layers, inputs and comparisons with the reference implementation for tests of the GPU's input transform."""

import torch
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import INPUT_TRANSFORM
from bwla_kernels.triton.prepare_input import QuantizedInput, split_rotations
from random_tensors import random_layer
from torch import Tensor

NORM_BOUND = 2.0**-16
"""Worst-case error of x_hat in units of the 2-norm of the token's rotation group, see the kernel's docstring."""


def make_layer(spec: LayerSpec, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Return the input transform of a random layer on `device`, with the split rotations."""
    layer = random_layer(spec, seed)
    tensors = {name: layer[name].to(device) for name in INPUT_TRANSFORM if name in layer}
    tensors["left_split"], tensors["right_split"] = split_rotations(
        tensors["rotation_left"], tensors["rotation_right"]
    )
    return tensors


def make_spec(groups: int, n1: int, n2: int, rank: int = 0, bits: int = 6, clip: float = 1.0) -> LayerSpec:
    return LayerSpec(64, groups * n1 * n2, groups, n1, n2, rank=rank, bits=bits, clip=clip)


def make_input(m: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Tensor:
    """Return tokens of very different magnitudes, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 10.0 ** torch.randint(-2, 3, (m, 1), generator=generator)
    x[:, :: max(1, k // 5)] *= 20
    return x.to(dtype).to(device)


def assert_close_to(prepared: QuantizedInput, x: Tensor, tensors: dict[str, Tensor], spec: LayerSpec) -> None:
    """Check every output against float64 on the same input."""
    m, groups = x.shape[0], spec.rotation_groups
    exact = reference.rotate(x.double(), tensors["rotation_left"], tensors["rotation_right"])
    cells = (exact * tensors["column_scale"].double()).unflatten(1, (groups, spec.group_width))
    norm = x.double().unflatten(1, (groups, spec.group_width)).norm(dim=-1, keepdim=True)
    error = norm * NORM_BOUND * tensors["column_scale"].max().double()
    step = cells.abs().amax(-1, keepdim=True) * spec.clip / spec.q_max
    assert prepared.scale.dtype == torch.float32
    assert prepared.scale.shape == (m, groups)
    off = (prepared.scale.double().unsqueeze(-1) - step).abs()
    assert (off <= error / spec.q_max + 1e-6 * step).all()

    q = prepared.q.unflatten(1, (groups, spec.group_width))
    assert prepared.q.dtype == torch.int8
    nonzero = step > 0
    ideal = torch.where(nonzero, cells / step, 0).clamp(-spec.q_max, spec.q_max)
    slack = torch.where(nonzero, 3 * error / step, 0)
    assert ((q.double() - ideal).abs() <= 0.5 + slack).all()
    expected = reference.prepare_input(x, tensors, spec)
    differing = (prepared.q != expected.q).sum().item()
    assert (prepared.q.int() - expected.q.int()).abs().max() <= 1
    assert differing <= 2 + prepared.q.numel() // 1000

    assert prepared.q_sum.dtype == torch.int32
    assert torch.equal(prepared.q_sum, q.int().sum(-1).int())
    if spec.rank:
        assert prepared.u is not None
        a = tensors["low_rank_a"].double()
        bound = (x.double().abs() @ a.abs().t()) * 2.0**-18
        assert ((prepared.u.double() - x.double() @ a.t()).abs() <= bound).all()
    else:
        assert prepared.u is None


def reference_planes(q: Tensor, spec: LayerSpec, chunk: int) -> Tensor:
    """Build the planes bit by bit, as documented in `QuantizedInput.planes`."""
    chunks = -(-spec.group_width // chunk)
    out = torch.zeros(q.shape[0], spec.bits, spec.rotation_groups * chunks, chunk // 8, dtype=torch.uint8)
    for g in range(spec.rotation_groups):
        for t in range(chunks):
            for b in range(chunk // 8):
                for j in range(8):
                    inside = chunk * t + chunk // 8 * j + b
                    if inside < spec.group_width:
                        code = q[:, g * spec.group_width + inside].int()
                        for p in range(spec.bits):
                            out[:, p, g * chunks + t, b] |= (((code >> p) & 1) << j).to(torch.uint8)
    return out.view(torch.int32)


def vllm_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute RMSNorm as vLLM's `ir/ops/layernorm.py` does."""
    total = x.float() if residual is None else x.float() + residual.float()
    scaled = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled.to(weight.dtype) * weight).to(x.dtype), total.to(x.dtype)


def assert_fused(prepared: QuantizedInput, x: Tensor, tensors: dict[str, Tensor], spec: LayerSpec) -> None:
    """Compare with the reference; fused inputs may differ by one rounding (exp, rsqrt), and so a few codes by one."""
    expected = reference.prepare_input(x, tensors, spec)
    difference = (prepared.q.int() - expected.q.int()).abs()
    assert difference.max() <= 1
    assert difference.sum() <= 1 + difference.numel() // 100
    torch.testing.assert_close(prepared.scale, expected.scale, rtol=1e-3, atol=0)
    assert torch.equal(
        prepared.q_sum, prepared.q.unflatten(1, (spec.rotation_groups, -1)).int().sum(-1).int()
    )
    assert prepared.u is not None
    assert expected.u is not None
    torch.testing.assert_close(prepared.u, expected.u, rtol=1e-3, atol=1e-3 * expected.u.abs().max().item())
