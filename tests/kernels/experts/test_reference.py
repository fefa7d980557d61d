"""The experts' reference implementation against dense matrices, and the checks of its sizes."""

import math
from dataclasses import replace

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.errors import BackendError, FormatError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.reference import binary_experts, gated
from bwla_kernels.experts.spec import expect_stacked, expert_tensors
from bwla_kernels.format import LayerSpec
from experts_cases import random_case

SPEC = ExpertsSpec(5, LayerSpec(192, 64, 1, 8, 8, rank=2), LayerSpec(64, 96, 3, 4, 8, rank=1))


def unquantized(spec: ExpertsSpec) -> ExpertsSpec:
    return replace(spec, gate_up=replace(spec.gate_up, bits=16), down=replace(spec.down, bits=16))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_without_activation_quantization_it_is_the_dense_layer(activation: str) -> None:
    spec = replace(unquantized(SPEC), activation=activation)
    case = random_case(spec, 7, 3)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    want = torch.zeros(7, 64)
    for token in range(7):
        for weight, expert in zip(case.weights[token], case.ids[token].tolist(), strict=True):
            w13 = reference.dequantize(expert_tensors(case.gate_up, expert), spec.gate_up)
            w2 = reference.dequantize(expert_tensors(case.down, expert), spec.down)
            gate, up = w13[:96] @ case.x[token], w13[96:] @ case.x[token]
            want[token] += weight * (w2 @ (functions[activation](gate) * up))
    torch.testing.assert_close(case.reference(), want, rtol=1e-4, atol=1e-4)


def test_experts_of_another_rank_add_nothing() -> None:
    case = random_case(SPEC, 6, 3)
    whole, parts = case.reference(), torch.zeros(6, 64)
    for own in ((0, 1), (2, 3, 4)):
        ids = torch.where(torch.isin(case.ids, torch.tensor(own)), case.ids, -1)
        parts += replace(case, ids=ids).reference()
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert not replace(case, ids=torch.full_like(case.ids, -1)).reference().any()


def test_a_token_does_not_depend_on_the_others() -> None:
    case = random_case(SPEC, 6, 2)
    parts = zip(case.x.split(1), case.weights.split(1), case.ids.split(1), strict=True)
    rows = [replace(case, x=x, weights=weights, ids=ids) for x, weights, ids in parts]
    torch.testing.assert_close(torch.cat([row.reference() for row in rows]), case.reference())


def test_the_result_has_the_dtype_of_x() -> None:
    case = random_case(SPEC, 3, 2)
    half = replace(case, x=case.x.bfloat16())
    exact = replace(case, x=half.x.float())
    assert torch.equal(half.reference(), exact.reference().bfloat16())


def test_the_gate_comes_first() -> None:
    rows = torch.tensor([[100.0, -100.0, 3.0, 5.0]])
    torch.testing.assert_close(gated(rows, "silu"), torch.tensor([[300.0, 0.0]]))


def test_the_activation_of_gpt_oss() -> None:
    """The gate has an upper limit only; values from the formula in transformers' GptOssExperts."""
    rows = torch.tensor([[9.0, -9.0, 1.0, 8.0, -8.0, 2.0]])
    want = torch.tensor([[7.0 * 8, -9.0 / (1 + math.exp(9 * 1.702)) * -6, 3.0 / (1 + math.exp(-1.702))]])
    torch.testing.assert_close(gated(rows, "swigluoai"), want, rtol=2e-5, atol=1e-6)
    other = torch.tensor([[2.0 / (1 + math.exp(-6.0)) * 3.0]])
    torch.testing.assert_close(gated(torch.tensor([[9.0, 9.0]]), "swigluoai", limit=2.0, alpha=3.0), other)


def test_biases_are_added_to_the_products_of_each_expert() -> None:
    biased = replace(SPEC, gate_up=replace(SPEC.gate_up, bias=True), down=replace(SPEC.down, bias=True))
    case = random_case(replace(unquantized(biased), activation="swigluoai"), 7, 3)
    expect_stacked("w13", case.gate_up, 5, case.spec.gate_up)
    assert case.gate_up["bias"].shape == (5, 192)
    want = torch.zeros(7, 64)
    for token in range(7):
        for weight, expert in zip(case.weights[token], case.ids[token].tolist(), strict=True):
            sides = (case.gate_up, case.spec.gate_up), (case.down, case.spec.down)
            (w13, b13), (w2, b2) = (
                (reference.dequantize(expert_tensors(side, expert), spec), side["bias"][expert].float())
                for side, spec in sides
            )
            hidden = gated(w13 @ case.x[token] + b13, "swigluoai")
            want[token] += weight * (w2 @ hidden + b2)
    torch.testing.assert_close(case.reference(), want, rtol=1e-4, atol=1e-4)


def test_a_bias_of_another_dtype_is_refused() -> None:
    biased = replace(SPEC, down=replace(SPEC.down, bias=True))
    case = random_case(biased, 3, 2)
    with pytest.raises(BackendError, match=r"w2.bias: expected dtype bfloat16, found float32"):
        expect_stacked("w2", {**case.down, "bias": case.down["bias"].float()}, 5, biased.down)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(FormatError, match="at least one expert"):
        replace(SPEC, experts=0)
    with pytest.raises(FormatError, match="twice as many rows as down has columns, found 190 and 96"):
        replace(SPEC, gate_up=replace(SPEC.gate_up, out_features=190))
    with pytest.raises(FormatError, match="as many values as they read, found 65 and 64"):
        replace(SPEC, down=replace(SPEC.down, out_features=65))
    with pytest.raises(FormatError, match="limit and alpha .* must be positive, found -7 and 1.702"):
        replace(SPEC, limit=-7.0)
    with pytest.raises(FormatError, match="expected an activation among silu.* found 'relu2'"):
        replace(SPEC, activation="relu2")


def test_tensors_and_arguments_that_do_not_fit_are_refused() -> None:
    case = random_case(SPEC, 3, 2)
    tensors = {name: tensor for name, tensor in case.gate_up.items() if name != "low_rank_b"}
    with pytest.raises(BackendError, match=r"w13.low_rank_b: expected a tensor \[5, 192, 2\], found none"):
        expect_stacked("w13", tensors, 5, SPEC.gate_up)
    with pytest.raises(
        BackendError, match=r"w13.weight_packed: expected shape \[6, 192, 2\], found \[5, 192, 2\]"
    ):
        expect_stacked("w13", case.gate_up, 6, SPEC.gate_up)
    with pytest.raises(BackendError, match=r"x: expected \[M, 64\], found \[3, 63\]"):
        binary_experts(case.x[:, 1:], case.weights, case.ids, case.gate_up, case.down, SPEC)
    with pytest.raises(BackendError, match=r"topk_weights: expected \[3, top-k\], found \[2, 2\]"):
        binary_experts(case.x, case.weights[1:], case.ids, case.gate_up, case.down, SPEC)
