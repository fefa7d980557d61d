"""Experts for tests: random ones, and ones whose codes are exact whatever the order of summation."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bwla_kernels.experts import ACTIVATIONS, ExpertsSpec
from bwla_kernels.experts.reference import binary_experts
from bwla_kernels.format import LayerSpec, pack_signs
from bwla_kernels.format.experts import BIAS_DTYPE
from bwla_kernels.format.layer import ROW_TENSORS, to_storage_dtype
from random_tensors import make_generator, random_layer
from torch import Tensor

GATE_STEP = 128.0
"""A gate that is a multiple of this is 0, or so large that silu and gelu return it, or 0, exactly."""


EXACT_ALPHA = 64.0
"""With it, gpt-oss's activation too returns a gate that is a multiple of `GATE_STEP`, limited, or 0 exactly."""


@dataclass(frozen=True)
class Case:
    """One application: sizes, stacked tensors, and arguments."""

    spec: ExpertsSpec
    gate_up: dict[str, Tensor]
    down: dict[str, Tensor]
    x: Tensor
    weights: Tensor
    ids: Tensor

    def reference(self) -> Tensor:
        return binary_experts(self.x, self.weights, self.ids, self.gate_up, self.down, self.spec)


def random_projection(experts: int, spec: LayerSpec, seed: int) -> dict[str, Tensor]:
    """Return stacked tensors of valid random linears that share the first one's input transform."""
    layers = [random_layer(spec, seed + 1000 * expert) for expert in range(experts)]
    stacked = {
        name: torch.stack([layer[name] for layer in layers]) if name in ROW_TENSORS else tensor
        for name, tensor in layers[0].items()
    }
    return with_bias_dtype(stacked)


def with_bias_dtype(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return stacked tensors whose bias, if there is one, has the dtype of those of experts."""
    return {name: tensor.to(BIAS_DTYPE) if name == "bias" else tensor for name, tensor in tensors.items()}


def random_case(spec: ExpertsSpec, tokens: int, top_k: int, seed: int = 0) -> Case:
    """Return experts with real rotations, normal inputs and a router that prefers some experts."""
    generator = make_generator(seed)
    gate_up = random_projection(spec.experts, spec.gate_up, seed)
    down = random_projection(spec.experts, spec.down, seed + 1)
    x = torch.randn(tokens, spec.hidden_size, generator=generator)
    logits = (
        torch.randn(tokens, spec.experts, generator=generator) + torch.arange(spec.experts) / spec.experts
    )
    weights, ids = logits.softmax(-1).topk(top_k, -1)
    return Case(spec, gate_up, down, x, weights, ids.to(torch.int32))


def _signed_permutations(groups: int, order: int, generator: torch.Generator) -> Tensor:
    eye = torch.eye(order)
    rows = [eye[torch.randperm(order, generator=generator)] for _ in range(groups)]
    signs = torch.randint(0, 2, (groups, order, 1), generator=generator) * 2 - 1
    return torch.stack(rows) * signs


def exact_projection(
    experts: int, spec: LayerSpec, scale: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return stacked tensors whose arithmetic on integers is exact: permutations, and `scale` [N] times powers of 2."""
    n, k, r = spec.out_features, spec.in_features, spec.rank
    shape = (n,) if spec.planes == 1 else (n, spec.planes)
    powers = 2.0 ** torch.arange(spec.planes - 1, -1, -1)
    row_scale = scale if spec.planes == 1 else scale[:, None] * powers
    stacked = {
        "weight_packed": pack_signs(torch.randint(0, 2, (experts, *shape, k), generator=generator)),
        "weight_scale": row_scale.expand(experts, *shape).contiguous(),
    }
    shared = {
        "rotation_left": _signed_permutations(spec.rotation_groups, spec.n1, generator),
        "rotation_right": _signed_permutations(spec.rotation_groups, spec.n2, generator),
        "column_scale": torch.ones(k),
    }
    if r:
        shared["low_rank_a"] = torch.randint(-1, 2, (r, k), generator=generator).float()
        stacked["low_rank_b"] = torch.randint(-1, 2, (experts, n, r), generator=generator) * scale[:, None]
    if spec.bias:
        # As whole as the rows' scales.
        stacked["bias"] = torch.randint(-3, 4, (experts, n), generator=generator) * scale
    tensors = {**stacked, **shared}
    return with_bias_dtype(to_storage_dtype(tensors, spec))


def exact_case(spec: ExpertsSpec, tokens: int, top_k: int, generator: torch.Generator) -> Case:
    """Return experts whose codes do not depend on rounding.

    The input consists of integers, one of each rotation group at the largest code, so that the activation scale is 1;
    the rotations permute and negate; gates are multiples of `GATE_STEP`. Then gate and up are exact, f(gate) * up is
    rounded once, and the codes of the hidden values are those of any correct implementation.
    """
    first, inner = spec.gate_up, spec.intermediate_size
    scale = torch.ones(2 * inner)
    scale[:inner] = GATE_STEP
    gate_up = exact_projection(spec.experts, first, scale, generator)
    down = exact_projection(spec.experts, spec.down, torch.ones(spec.hidden_size), generator)
    x = torch.randint(-first.q_max, first.q_max + 1, (tokens, spec.hidden_size), generator=generator).float()
    x[:, :: first.group_width] = first.q_max
    ids = torch.stack([torch.randperm(spec.experts, generator=generator)[:top_k] for _ in range(tokens)])
    kind = int(torch.randint(0, 5, (), generator=generator))
    if kind == 0:
        ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1  # experts of another rank
    elif kind == 1:
        ids[:] = int(ids[0, 0])  # all tokens, several times each, on one expert
    weights = torch.rand(ids.shape, generator=generator) + 0.1
    return Case(spec, gate_up, down, x, weights, ids.to(torch.int32))


def random_sizes(rng: random.Random) -> tuple[ExpertsSpec, int, int]:
    """Return sizes of all kinds, a number of tokens and a top-k."""

    def projection(rows: int, words: int, groups: int) -> LayerSpec:
        width = 32 * words
        n1 = rng.choice([d for d in range(1, width + 1) if width % d == 0])
        return LayerSpec(
            rows,
            groups * width,
            groups,
            n1,
            width // n1,
            rank=rng.choice([0, 0, 1, 4, 5]),
            bits=rng.randint(2, 8),
            planes=rng.choice([1, 1, 1, 2, 3]),
            bias=rng.random() < 0.4,
        )

    words, groups = rng.choice([1, 2, 3, 5]), rng.choice([1, 1, 2, 3])
    inner_words, inner_groups = rng.choice([1, 1, 2, 3, 4]), rng.choice([1, 1, 2])
    hidden, inner, experts = 32 * words * groups, 32 * inner_words * inner_groups, rng.randint(1, 9)
    spec = ExpertsSpec(
        experts,
        projection(2 * inner, words, groups),
        projection(hidden, inner_words, inner_groups),
        rng.choice(ACTIVATIONS),
        limit=rng.choice([7.0, 512.0]),
        alpha=EXACT_ALPHA,
    )
    tokens = rng.choice([1, 1, 1, 2, 3, 5, rng.randint(1, 40)])
    return spec, tokens, rng.randint(1, min(experts, 4))


def exact_cases(seed: int, count: int) -> Iterator[Case]:
    """Yield that many exact cases of random sizes."""
    rng, generator = random.Random(seed), make_generator(seed)
    for _ in range(count):
        spec, tokens, top_k = random_sizes(rng)
        yield exact_case(spec, tokens, top_k, generator)


def assert_exact(y: Tensor, case: Case) -> None:
    """Compare an implementation with the reference closely enough that one wrong integer fails.

    One more or less in an integer sum changes an output by about a thousandth of the token's largest one; rounding
    in float32 and, with a rank, the order of the sums, by a few millionths.
    """
    want = case.reference()
    bound = (1e-5 if case.spec.down.rank else 4e-6) * want.abs().amax(-1, keepdim=True) + 1e-30
    assert y.dtype == want.dtype
    assert ((y - want).abs() <= bound).all(), (case.spec, len(case.x), case.ids.tolist())
