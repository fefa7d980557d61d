"""Groups of experts: one input transform for all, the signs of each expert for its own inputs."""

from dataclasses import replace

import pytest
import torch
from bwla_converter.quantize import experts, fast, paper
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import INPUT_TRANSFORM
from bwla_kernels.reference import dequantize
from torch import Tensor

SPEC = LayerSpec(48, 64, 2, 4, 8, rank=2)
DOWN = [f"layer.experts.{number}.down_proj" for number in range(4)]
GATE_UP = [f"layer.experts.{number}.{leaf}" for number in range(4) for leaf in ("gate_proj", "up_proj")]

METHODS = {
    "fast": experts.fast_method(fast.FastOptions(okt_rounds=5), 1),
    "paper": experts.paper_method(paper.PaperOptions(okt_rounds=5, psp_rounds=5)),
}


def inputs_of(seed: int, count: int = 300) -> Tensor:
    """Return inputs with correlations of their own for each seed."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0.5, -1.5, 64)
    return torch.randn(count, 64, generator=generator) @ mixing


def moments_of(*parts: Tensor) -> Moments:
    moments = Moments.zeros(64, torch.device("cpu"), cross_gram=True)
    for x in parts:
        moments.add(x, x)
    return moments


def down_moments() -> Moments:
    own = {name: moments_of(inputs_of(number)) for number, name in enumerate(DOWN)}
    return replace(moments_of(*(inputs_of(number) for number in range(4))), parts=own)


def weights_of(names: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(48, 64, generator=generator) for name in names}


def quantize(names: list[str], moments: Moments, method: str = "fast", **options: object) -> GroupResult:
    specs = dict.fromkeys(names, SPEC)
    return experts.quantize_group(weights_of(names), specs, moments, METHODS[method], **options)  # type: ignore[arg-type]


def output_error(result: GroupResult, name: str, x: Tensor) -> float:
    difference = dequantize(result.tensors[name], SPEC) - weights_of(list(result.tensors))[name]
    return float((x @ difference.mT).norm() / (x @ weights_of(list(result.tensors))[name].mT).norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", [DOWN, GATE_UP])
def test_all_linears_have_the_same_input_transform(names: list[str], method: str) -> None:
    moments = down_moments() if names is DOWN else moments_of(inputs_of(0))
    result = quantize(names, moments, method)
    assert list(result.tensors) == names
    first = result.tensors[names[0]]
    for tensors in result.tensors.values():
        assert all(torch.equal(tensors[key], first[key]) for key in INPUT_TRANSFORM)
    assert all(0.0 < error < 1.0 for error in result.errors.values())


@pytest.mark.parametrize("method", METHODS)
def test_down_is_fitted_to_the_inputs_of_its_expert(method: str) -> None:
    own = quantize(DOWN, down_moments(), method)
    pooled = quantize(DOWN, replace(down_moments(), parts={}), method)
    better = [
        output_error(own, name, inputs_of(number)) < output_error(pooled, name, inputs_of(number))
        for number, name in enumerate(DOWN)
    ]
    assert all(better)


def test_chunks_do_not_change_the_result(monkeypatch) -> None:
    whole = quantize(GATE_UP, moments_of(inputs_of(0)))
    monkeypatch.setattr(experts, "CHUNK_ROWS", 100)
    parts = quantize(GATE_UP, moments_of(inputs_of(0)))
    for name in GATE_UP:
        packed, others = (result.tensors[name]["weight_packed"] for result in (whole, parts))
        assert (packed != others).float().mean() < 0.02  # products of other shapes are rounded differently


def test_the_input_transform_is_learned_on_some_rows_of_every_linear(monkeypatch) -> None:
    monkeypatch.setattr(experts, "SAMPLE_ROWS", 96)
    seen: list[int] = []
    learn = METHODS["fast"].learn

    def spy(weights, spec, moments, generator):
        seen.extend(map(len, weights.values()))
        return learn(weights, spec, moments, generator)

    specs = dict.fromkeys(GATE_UP, SPEC)
    method = replace(METHODS["fast"], learn=spy)
    result = experts.quantize_group(weights_of(GATE_UP), specs, moments_of(inputs_of(0)), method)
    assert seen == [12] * 8
    assert all(error < 0.7 for error in result.errors.values())


def test_an_expert_without_inputs_is_fitted_to_those_of_all() -> None:
    moments = down_moments()
    empty = {**moments.parts, DOWN[2]: Moments.zeros(64, torch.device("cpu"), cross_gram=True)}
    result = quantize(DOWN, replace(moments, parts=empty))
    assert output_error(result, DOWN[2], torch.cat([inputs_of(number) for number in range(4)])) < 0.8


def test_a_clip_is_chosen_for_the_group() -> None:
    inputs = inputs_of(0)
    inputs[0] *= 30
    chosen = quantize(GATE_UP, moments_of(inputs), inputs=inputs)
    assert chosen.clip is not None
    assert 0 < chosen.clip <= 1
    assert quantize(GATE_UP, moments_of(inputs)).clip is None


def test_planes_reduce_the_error() -> None:
    moments, names = down_moments(), DOWN
    spec = replace(SPEC, planes=2)
    method = experts.fast_method(fast.FastOptions(okt_rounds=5, planes_damping=0.04, damping_tokens=0), 2)
    result = experts.quantize_group(weights_of(names), dict.fromkeys(names, spec), moments, method)
    one = quantize(names, moments)
    assert all(result.errors[name] < 0.7 * one.errors[name] for name in names)
    assert ("moment" in result.traces, "okt" in result.traces) == (True, False)
    assert ("moment" in one.traces, "okt" in one.traces) == (False, True)
