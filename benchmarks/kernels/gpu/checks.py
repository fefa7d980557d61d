"""Check a layer's results, before it is timed: both kernels against float64."""

from dataclasses import asdict, dataclass

import torch
from bwla_kernels import reference
from bwla_kernels.triton.prepare_input import QuantizedInput
from torch import Tensor

from benchmarks.kernels.gpu.journal import Row
from benchmarks.kernels.gpu.layers import (
    Inputs,
    Layer,
    call,
    config_of,
    gemm,
    input_transform,
    step_in_torch,
)
from benchmarks.kernels.gpu.shapes import ADD_NORM

SAMPLED_ROWS = 256
"""Number of output rows at each end that are compared with float64."""

SAMPLED_TOKENS = 256
"""Number of tokens at each end that are compared with float64."""


@dataclass(frozen=True)
class Limits:
    """Largest errors that rounding explains: of the output, and of codes near a tie."""

    matmul: float
    codes_share: float
    codes: int
    scale: float
    u: float = 5e-3


def limits_of(step: str, dtype: torch.dtype) -> Limits:
    """Return the limits for the operation before the layer and the output's dtype."""
    matmul = 3e-3 if dtype == torch.bfloat16 else 1e-3
    return Limits(matmul, 0.02, 2, 1e-2) if step else Limits(matmul, 0.002, 1, 1e-4)


def _relative(found: Tensor, wanted: Tensor) -> float:
    norm = wanted.double().norm().item()
    return float((found.double() - wanted.double()).norm().item() / norm) if norm else 0.0


def _ends(count: int, sample: int, device: torch.device) -> Tensor:
    """Return the indices of the first and the last `sample` of `count` items."""
    first = torch.arange(min(count, sample), device=device)
    return torch.cat([first, torch.arange(max(len(first), count - sample), count, device=device)])


def input_errors(step: str, inputs: Inputs, layer: Layer, found: QuantizedInput) -> Row:
    """Compare codes, scales, sums, projection and residual with the reference implementation."""
    spec = layer.spec
    tokens = _ends(len(inputs.x), SAMPLED_TOKENS, inputs.x.device)
    part = Inputs(inputs.x[tokens], inputs.norm_weight, inputs.residual[tokens])
    ready = step_in_torch(step, part)
    wanted = reference.prepare_input(ready.float() if step else ready, layer.stored, spec)
    off = (found.q[tokens].int() - wanted.q.int()).abs()
    sums = found.q.unflatten(1, (spec.rotation_groups, -1)).sum(-1, dtype=torch.int32)
    row: Row = {
        "codes_off_share": off.float().mean().item(),
        "codes_off_max": int(off.max().item()),
        "scale_rel": ((found.scale[tokens] - wanted.scale).abs() / wanted.scale).max().item(),
        "q_sum_ok": torch.equal(found.q_sum, sums),
    }
    if found.u is not None and wanted.u is not None:
        row["u_rel"] = _relative(found.u[tokens], wanted.u)
    if step == ADD_NORM and found.residual is not None:
        total = (inputs.x.float() + inputs.residual.float()).to(inputs.x.dtype)
        row["residual_ok"] = torch.equal(found.residual, total)
    return row


def matmul_error(y: Tensor, layer: Layer, prepared: QuantizedInput) -> float:
    """Return the relative error of the GEMM, given the codes that the input kernel computed."""
    spec, stored = layer.spec, layer.stored
    rows = _ends(spec.out_features, SAMPLED_ROWS, y.device)
    tokens = _ends(len(y), SAMPLED_TOKENS, y.device)
    sampled = {name: stored[name][rows] for name in ("weight_packed", "weight_scale")}
    signs, alpha = reference.planes(sampled, spec)
    weight = torch.einsum("npk,npi->nk", signs.double(), alpha.double())
    scale = prepared.scale[tokens].double().repeat_interleave(spec.group_width, 1)
    exact = (prepared.q[tokens].double() * scale) @ weight.t()
    if prepared.u is not None:
        exact += prepared.u[tokens].double() @ stored["low_rank_b"][rows].double().t()
    if spec.bias:
        exact += stored["bias"][rows].double()
    return _relative(y[tokens][:, rows], exact)


def _equal_in_a_graph(step: str, inputs: Inputs, layer: Layer, wanted: Tensor) -> bool:
    """Return whether a captured call computes the same bits in each of three replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = call(step, inputs, layer.prepared, layer.spec)
    captured.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return torch.equal(captured, wanted)


def check(step: str, inputs: Inputs, layer: Layer, row: Row) -> bool:
    """Fill `row` with the errors of a layer and with `ok`, and return `ok`.

    Both kernels are checked separately, the GEMM with the codes that the input kernel computed, to show which one is
    wrong. Then the whole layer must equal its parts bit for bit in every call.
    """
    spec, dtype = layer.spec, inputs.x.dtype
    row["config"] = str(config_of(spec, layer.prepared, len(inputs.x), inputs.x.device))
    row["ok"] = False
    prepared = input_transform(step, inputs, layer.prepared, spec)
    row |= input_errors(step, inputs, layer, prepared)
    y = gemm(prepared, layer.prepared, spec, dtype)
    row["matmul_rel"] = matmul_error(y, layer, prepared)
    row["finite"] = bool(y.isfinite().all())
    whole, _ = call(step, inputs, layer.prepared, spec)
    row["whole_is_parts"] = torch.equal(whole, y)
    again = [call(step, inputs, layer.prepared, spec)[0] for _ in range(3 if y.is_cuda else 1)]
    row["deterministic"] = all(torch.equal(other, whole) for other in again)
    if y.is_cuda:
        row["graph_ok"] = _equal_in_a_graph(step, inputs, layer, whole)
    row["ok"] = is_right(row, limits_of(step, dtype))
    return bool(row["ok"])


def is_right(row: Row, limits: Limits) -> bool:
    """Return whether the errors of a row are within the limits; NaN never is."""
    small = (
        row["matmul_rel"] < limits.matmul
        and row["codes_off_share"] < limits.codes_share
        and row["codes_off_max"] <= limits.codes
        and row["scale_rel"] < limits.scale
        and row.get("u_rel", 0.0) < limits.u
    )
    exact = ("q_sum_ok", "residual_ok", "finite", "whole_is_parts", "deterministic", "graph_ok")
    return bool(small and all(row.get(name, True) for name in exact))


def described(limits: Limits) -> Row:
    """Return the limits as entries of a row."""
    return asdict(limits)
