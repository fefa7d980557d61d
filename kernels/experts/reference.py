"""Reference implementation of the experts of one layer, in plain torch: every kernel is tested against it."""

from collections.abc import Mapping

import torch
from bwla_kernels import reference
from bwla_kernels.experts.spec import ALPHA, LIMIT, SWIGLU_OAI, ExpertsSpec, expect_routing, expert_tensors
from bwla_kernels.reference import PreparedInput
from torch import Tensor


def swiglu_oai(gate: Tensor, up: Tensor, limit: float = LIMIT, alpha: float = ALPHA) -> Tensor:
    """Compute g sigmoid(alpha g) (u + 1), with the gate g limited from above and u, from up, on both sides.

    This is gpt-oss's activation (transformers, `GptOssExperts._apply_gate`).

    Args:
        gate, up: [..., I], any float dtype, in which it computes.
        limit: the largest gate, and the largest magnitude of up.
        alpha: factor in the sigmoid.
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate * alpha) * (up + 1)


def gated(rows: Tensor, activation: str, limit: float = LIMIT, alpha: float = ALPHA) -> Tensor:
    """Compute f(gate) * up, or `swiglu_oai`, from float32 [..., 2 I], the gate first: float32 [..., I]."""
    gate, up = rows.chunk(2, dim=-1)
    if activation == SWIGLU_OAI:
        return swiglu_oai(gate, up, limit, alpha)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def select_rows(prepared: PreparedInput, rows: Tensor) -> PreparedInput:
    """Return some rows of a prepared input; `rows` int64 [R] may repeat."""
    u = None if prepared.u is None else prepared.u[rows]
    return PreparedInput(prepared.q[rows], prepared.scale[rows], u)


def binary_experts(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Mapping[str, Tensor],
    down: Mapping[str, Tensor],
    spec: ExpertsSpec,
) -> Tensor:
    """Compute y[m] = sum_j topk_weights[m, j] * (W2_e (f(W1_e x[m]) * W3_e x[m])) with e = topk_ids[m, j].

    Where the projections have biases, they are added to their products.

    All arithmetic after the input is in float32, without rounding in between; the sum runs over ascending j.

    Args:
        x: [M, H], any float dtype.
        topk_weights: float [M, top-k], the router's weights.
        topk_ids: int [M, top-k], experts 0..E - 1; -1 where the expert belongs to another rank: it adds nothing.
        gate_up: stacked tensors of W1 and W3 (see `spec.stacked_specs`).
        down: stacked tensors of W2.
        spec: the sizes.

    Returns: [M, H] in the dtype of x.

    Raises:
        BackendError: shapes that do not fit.
    """
    expect_routing(x, topk_weights, topk_ids, spec)
    prepared = reference.prepare_input(x, gate_up, spec.gate_up)
    terms = torch.zeros(*topk_ids.shape, spec.hidden_size, device=x.device)
    for expert in topk_ids[topk_ids >= 0].unique().tolist():
        tokens, slots = torch.where(topk_ids == expert)
        first = expert_tensors(gate_up, expert)
        hidden = reference.binary_matmul(select_rows(prepared, tokens), first, spec.gate_up)
        second = expert_tensors(down, expert)
        values = gated(hidden, spec.activation, spec.limit, spec.alpha)
        inner = reference.prepare_input(values, second, spec.down)
        terms[tokens, slots] = reference.binary_matmul(inner, second, spec.down)
    y = torch.zeros(len(x), spec.hidden_size, device=x.device)
    for slot in range(topk_ids.shape[1]):
        y += topk_weights[:, slot : slot + 1].float() * terms[:, slot]
    return y.to(x.dtype)
