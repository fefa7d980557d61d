"""The grouped GEMM of experts, and the whole layer: in the interpreter here, for real where there is a GPU."""

import os
import random
from dataclasses import replace

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.errors import BackendError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.reference import select_rows
from bwla_kernels.experts.spec import expert_tensors
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import PreparedInput
from bwla_kernels.triton.experts import (
    FEW,
    MANY,
    align_pairs,
    choose_config,
    grouped_matmul,
    repack_experts,
)
from bwla_kernels.triton.experts_backend import TritonExperts
from bwla_kernels.triton.prepare_input import QuantizedInput
from experts_cases import Case, exact_case, random_case, random_sizes
from torch import Tensor

SPEC = ExpertsSpec(
    3, LayerSpec(64, 64, 1, 8, 8, rank=2), LayerSpec(64, 32, 1, 4, 8, rank=1, bits=8, planes=2)
)
"""Small: the interpreter takes a second for each tile."""


CASES = int(os.environ.get("BWLA_EXPERTS_CASES", "30"))
"""Random cases of the grouped GEMM; the interpreter takes about a second for each."""


def compute(case: Case, device: torch.device) -> Tensor:
    backend = TritonExperts()
    sides = [
        {name: tensor.to(device) for name, tensor in stored.items()} for stored in (case.gate_up, case.down)
    ]
    tensors = backend.prepare(*sides, case.spec)
    arguments = [tensor.to(device) for tensor in (case.x, case.weights, case.ids)]
    return backend.apply(*arguments, tensors, case.spec).cpu()


@pytest.mark.parametrize("seed", range(10))
def test_pairs_are_aligned_to_tiles_of_one_expert(seed: int, device: torch.device) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(100):
        experts, tokens, block = rng.randint(1, 20), rng.randint(1, 70), rng.choice([16, 64])
        ids = torch.randint(rng.choice([-1, 0]), experts, (tokens, rng.randint(1, 8)), generator=generator)
        if rng.random() < 0.2:
            ids[:] = ids[0, 0]
        rows, owners = (tensor.cpu() for tensor in align_pairs(ids.to(device), experts, block))
        flat, pairs = ids.flatten(), ids.numel()
        taken = rows[rows < pairs].long()
        assert sorted(taken.tolist()) == (flat >= 0).nonzero().flatten().tolist()
        for tile, owner in zip(rows.split(block), owners.tolist(), strict=True):
            own = tile[tile < pairs].long()
            assert bool(len(own)) == (owner >= 0)
            assert (flat[own] == owner).all()
            assert own.tolist() == sorted(own.tolist())


def grouped_case(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The grouped GEMM of random integers, and what the reference computes of them."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes, tokens, top_k = random_sizes(rng)
    case = exact_case(sizes, tokens, top_k, generator)
    spec, experts = replace(sizes.gate_up, rank=rng.choice([0, 0, 3])), sizes.experts
    case = exact_case(replace(sizes, gate_up=spec), tokens, top_k, generator)
    by_pair = rng.random() < 0.5
    count = tokens * top_k if by_pair else tokens
    q = torch.randint(-spec.q_max, spec.q_max + 1, (count, spec.in_features), generator=generator).to(
        torch.int8
    )
    scale = 2.0 ** torch.randint(-2, 3, (count, spec.rotation_groups), generator=generator)
    u = torch.randint(-9, 10, (count, spec.rank), generator=generator).float() if spec.rank else None
    router = 2.0 ** torch.randint(-2, 2, case.ids.shape, generator=generator) if rng.random() < 0.5 else None
    q_sum = q.unflatten(1, (spec.rotation_groups, -1)).sum(-1, dtype=torch.int32)

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    prepared = QuantizedInput(q.to(device), scale.to(device), q_sum.to(device), there(u))
    tensors = repack_experts({name: t.to(device) for name, t in case.gate_up.items()}, experts, spec)
    config = rng.choice([None, FEW, MANY])
    y = grouped_matmul(prepared, tensors, spec, case.ids.to(device), there(router), config).cpu()
    want = torch.zeros_like(y)
    for pair, expert in enumerate(case.ids.flatten().tolist()):
        if expert >= 0:
            row = torch.tensor([pair if by_pair else pair // top_k])
            one = select_rows(PreparedInput(q, scale, u), row)
            want[pair] = reference.binary_matmul(one, expert_tensors(case.gate_up, expert), spec)[0]
    return y, want if router is None else want * router.flatten()[:, None]


@pytest.mark.parametrize("seed", range(CASES))
def test_the_grouped_gemm_is_exact(seed: int, device: torch.device) -> None:
    """Whole numbers and powers of two: every sum is exact in float32, and so must be the result."""
    y, want = grouped_case(seed, device)
    assert torch.equal(y, want)


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 3), (5, 2)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swigluoai"])
def test_the_layer_agrees_with_the_reference(
    device: torch.device, tokens: int, top_k: int, activation: str
) -> None:
    spec = replace(SPEC, activation=activation)
    if activation == "swigluoai":
        spec = replace(spec, gate_up=replace(SPEC.gate_up, bias=True), down=replace(SPEC.down, bias=True))
    case = random_case(spec, tokens, top_k)
    want = case.reference()
    # A sum in another order may move a code at a rounding boundary by one.
    assert (compute(case, device) - want).norm() <= 2e-3 * want.norm()


def test_dtypes_and_experts_of_another_rank(device: torch.device) -> None:
    case = random_case(SPEC, 4, 2)
    case = replace(case, x=case.x.to(torch.float16), ids=torch.where(case.ids == 2, -1, case.ids))
    y, want = compute(case, device), case.reference()
    assert y.dtype == torch.float16
    assert (y.float() - want.float()).norm() <= 4e-3 * want.float().norm()
    assert not compute(replace(case, ids=torch.full_like(case.ids, -1)), device).any()


def test_other_tokens_change_nothing(device: torch.device) -> None:
    case = random_case(SPEC, 6, 2)
    part = replace(case, x=case.x[:4], weights=case.weights[:4], ids=case.ids[:4])
    torch.testing.assert_close(compute(part, device), compute(case, device)[:4], rtol=1e-5, atol=1e-5)


def test_the_larger_tile_is_for_many_pairs() -> None:
    assert choose_config(8, 128) == FEW
    assert choose_config(512 * 8, 128) == MANY


def test_only_a_gpu_runs_them_outside_of_tests() -> None:
    able, reason = TritonExperts().can_implement(SPEC, torch.device("cpu"))
    assert not able
    assert "on an NVIDIA GPU, not on cpu" in reason


def test_a_gradient_is_refused_in_words(device: torch.device) -> None:
    case = random_case(SPEC, 1, 1)
    y = compute(replace(case, x=case.x.requires_grad_()), device)
    with pytest.raises(BackendError, match="experts_triton has no gradient"):
        y.sum().backward()
