"""The CPU kernel of the experts: exact integers over random sizes; the promises about threads and tokens."""

from dataclasses import replace

import pytest
import torch
from bwla_kernels.cpu import experts as kernel
from bwla_kernels.cpu.library import Isa
from bwla_kernels.errors import BackendError
from bwla_kernels.experts import ACTIVATIONS, ExpertsSpec
from bwla_kernels.format import LayerSpec
from experts_cases import Case, assert_exact, exact_cases, random_case

SPEC = ExpertsSpec(
    12, LayerSpec(2 * 96, 640, 2, 16, 20, rank=5, planes=2), LayerSpec(640, 96, 3, 4, 8, rank=3, bits=8)
)

BIASED = replace(SPEC, gate_up=replace(SPEC.gate_up, bias=True), down=replace(SPEC.down, bias=True))


def compute(case: Case, isa: Isa | None = None, threads: int | None = None) -> torch.Tensor:
    packed = kernel.pack(case.gate_up, case.down, case.spec, isa)
    biases = kernel.pack_biases(case.gate_up, case.down, case.spec)
    return kernel.experts(case.x, case.weights, case.ids, packed, case.spec, isa, threads, biases)


@pytest.mark.parametrize("seed", range(10))
def test_integers_are_exact(variants: list[Isa], seed: int) -> None:
    for number, case in enumerate(exact_cases(seed, 100)):
        isa = variants[number % len(variants)]
        assert_exact(compute(case, isa, (-1, -1, -2, -5)[number % 4]), case)


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 8), (3, 8), (60, 2), (60, 12)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("spec", [SPEC, BIASED], ids=["plain", "biased"])
def test_real_rotations(isa: Isa, tokens: int, top_k: int, activation: str, spec: ExpertsSpec) -> None:
    case = random_case(replace(spec, activation=activation), tokens, top_k)
    y, want = compute(case, isa, -2), case.reference()
    # A sum in another order may move a code at a rounding boundary by one.
    assert (y - want).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_range(isa: Isa, activation: str) -> None:
    """Inputs from where the functions are linear to where they are 0 or the gate itself."""
    spec = ExpertsSpec(
        1, LayerSpec(64, 32, 1, 1, 32, bits=2), LayerSpec(32, 32, 1, 1, 32, bits=8), activation
    )
    case = random_case(spec, 1, 1)
    for size in (1e-6, 1e-2, 0.3, 1.0, 3.0, 10.0, 80.0, 1e3, 1e8):
        scaled = replace(case, x=case.x * size)
        y, want = compute(scaled, isa), scaled.reference()
        assert (y - want).norm() <= 2e-3 * want.norm() + 1e-37


def test_many_tokens_take_several_batches(isa: Isa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden values and outputs of 1,400 tokens with 12 experts each exceed what is computed at a time."""
    case = random_case(replace(SPEC, gate_up=replace(SPEC.gate_up, rank=0)), 10, 12)
    many = replace(
        case, x=case.x.repeat(190, 1), weights=case.weights.repeat(190, 1), ids=case.ids.repeat(190, 1)
    )
    assert torch.equal(compute(many, isa), compute(case, isa).repeat(190, 1))


@pytest.mark.parametrize("threads", [-1, -2, -3, -5, -16, 2])
def test_the_number_of_threads_changes_nothing(isa: Isa, threads: int) -> None:
    case = random_case(SPEC, 30, 4)
    assert torch.equal(compute(case, isa, threads), compute(case, isa, 1))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 40])
def test_other_tokens_change_nothing(isa: Isa, count: int) -> None:
    case = random_case(SPEC, 41, 4)
    part = replace(case, x=case.x[:count], weights=case.weights[:count], ids=case.ids[:count])
    assert torch.equal(compute(part, isa, -2), compute(case, isa, -2)[:count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once_to_the_dtype_of_x(isa: Isa, dtype: torch.dtype) -> None:
    case = random_case(SPEC, 5, 4)
    half = replace(case, x=case.x.to(dtype))
    exact = replace(case, x=half.x.float())
    assert torch.equal(compute(half, isa), compute(exact, isa).to(dtype))


def test_experts_of_another_rank_add_nothing(isa: Isa) -> None:
    case = random_case(SPEC, 9, 4)
    none = replace(case, ids=torch.full_like(case.ids, -1))
    assert not compute(none, isa).any()
    own = replace(case, ids=torch.where(case.ids < 6, case.ids, -1))
    others = replace(case, ids=torch.where(case.ids < 6, -1, case.ids))
    torch.testing.assert_close(
        compute(own, isa) + compute(others, isa), compute(case, isa), rtol=1e-4, atol=1e-4
    )


def test_no_tokens(isa: Isa) -> None:
    case = random_case(SPEC, 1, 4)
    empty = replace(case, x=case.x[:0], weights=case.weights[:0], ids=case.ids[:0])
    assert compute(empty, isa).shape == (0, 640)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_hidden_and_stays_in_its_token(isa: Isa, activation: str) -> None:
    case = random_case(replace(BIASED, activation=activation), 6, 4)
    x = case.x.clone()
    x[2, 100] = float("nan")
    y, want = compute(replace(case, x=x), isa, -2), compute(case, isa, -2)
    assert not y[2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], want[others])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("spec", [SPEC, replace(BIASED, activation="swigluoai")], ids=["plain", "biased"])
def test_the_op_agrees_with_the_function_and_is_registered_correctly(
    dtype: torch.dtype, spec: ExpertsSpec
) -> None:
    case, backend = random_case(spec, 5, 4), kernel.CpuExperts()
    prepared = backend.prepare(case.gate_up, case.down, spec)
    y = backend.apply(case.x, case.weights, case.ids.to(dtype), prepared, spec)
    assert torch.equal(y, compute(case))
    strided = torch.zeros(5, 700)
    strided[:, 30:670] = case.x
    assert torch.equal(backend.apply(strided[:, 30:670], case.weights, case.ids.to(dtype), prepared, spec), y)
    sizes = [
        (s.rotation_groups, s.n1, s.n2, s.rank, s.bits, s.clip, s.planes) for s in (spec.gate_up, spec.down)
    ]
    names = ("packed_gate_up", "packed_down", "bias_gate_up", "bias_down")
    tensors = (case.x, case.weights, case.ids.to(dtype), *(prepared.get(name) for name in names))
    numbers = (12, ACTIVATIONS.index(spec.activation), 7.0, 1.702)
    torch.library.opcheck(torch.ops.bwla.experts_cpu.default, (*tensors, *numbers, *sizes[0], *sizes[1]))


def test_what_does_not_fit_is_refused_in_words() -> None:
    case = random_case(SPEC, 3, 2)
    packed = kernel.pack(case.gate_up, case.down, SPEC)
    backend, tensors = kernel.CpuExperts(), dict(zip(("packed_gate_up", "packed_down"), packed, strict=True))
    with pytest.raises(BackendError, match="an expert's number is too large"):
        kernel.experts(case.x, case.weights, torch.full_like(case.ids, 12), packed, SPEC)
    with pytest.raises(RuntimeError, match="topk_ids below the number of experts"):
        backend.apply(case.x, case.weights, torch.full_like(case.ids, 12), tensors, SPEC)
    with pytest.raises(RuntimeError, match="packed experts of this layer"):
        backend.apply(case.x, case.weights, case.ids, tensors, replace(SPEC, experts=11))
    with pytest.raises(BackendError, match="packed down: expected contiguous torch.uint8"):
        kernel.experts(case.x, case.weights, case.ids, (packed[0], packed[1][1:]), SPEC)
    with pytest.raises(
        BackendError, match=r"gate_up.weight_scale: expected contiguous torch.bfloat16 \[12, 192, 2\]"
    ):
        kernel.pack({**case.gate_up, "weight_scale": case.gate_up["weight_scale"].float()}, case.down, SPEC)
    case = random_case(BIASED, 3, 2)
    with pytest.raises(BackendError, match=r"down.bias: expected contiguous torch.bfloat16 \[12, 640\]"):
        kernel.pack_biases(case.gate_up, {**case.down, "bias": case.down["bias"].float()}, BIASED)
    tensors = backend.prepare(case.gate_up, case.down, BIASED)
    short = {**tensors, "bias_down": tensors["bias_down"][1:]}
    with pytest.raises(RuntimeError, match="contiguous biases of these experts in bfloat16"):
        backend.apply(case.x, case.weights, case.ids, short, BIASED)
    able, reason = backend.can_implement(replace(SPEC, down=replace(SPEC.down, bits=16)), torch.device("cpu"))
    assert not able
    assert "quantized activations" in reason


def test_a_gradient_is_refused_in_words() -> None:
    case, backend = random_case(SPEC, 2, 2), kernel.CpuExperts()
    tensors = backend.prepare(case.gate_up, case.down, SPEC)
    y = backend.apply(case.x.requires_grad_(), case.weights, case.ids, tensors, SPEC)
    with pytest.raises(BackendError, match="experts_cpu has no gradient: experts are for inference only"):
        y.sum().backward()
