"""Recipe `paper` on one group: OKT and PSP of the weights, and signs and scales for the inputs."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from bwla_converter.quantize import data_free, paper
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_converter.quantize.paper import PaperOptions
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, validate_layer
from bwla_kernels.reference import dequantize, rotate
from torch import Tensor

QUICK = PaperOptions(okt_rounds=4, psp_rounds=4)
SPECS = {"q": LayerSpec(48, 64, 1, 8, 8, rank=2), "k": LayerSpec(24, 64, 1, 8, 8, rank=2)}


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(spec.out_features, 64, generator=generator) for name, spec in SPECS.items()}


@pytest.fixture
def x() -> Tensor:
    """Correlated inputs [600, 64], some columns of which are much larger than the others."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1, 64)
    return torch.randn(600, 64, generator=generator) @ mix.mT


def moments_of(x: Tensor) -> Moments:
    moments = Moments.zeros(64, torch.device("cpu"), cross_gram=False)
    moments.add(x)
    return moments


def output_error(weights: dict[str, Tensor], result: GroupResult, x: Tensor) -> float:
    squared_error = sum(
        (x @ (weight - dequantize(result.tensors[name], SPECS[name])).mT).square().sum()
        for name, weight in weights.items()
    )
    squared_norm = sum((x @ weight.mT).square().sum() for weight in weights.values())
    return float((squared_error / squared_norm).sqrt())


def test_valid_and_much_closer_to_the_outputs_than_data_free(weights: dict[str, Tensor], x: Tensor) -> None:
    result = paper.quantize_group(weights, SPECS, moments_of(x), options=QUICK)
    for name, tensors in result.tensors.items():
        validate_layer(name, tensors, SPECS[name])
        for key in ("rotation_left", "rotation_right", "column_scale", "low_rank_a"):
            assert torch.equal(tensors[key], result.tensors["q"][key])
    few = data_free.DataFreeOptions(okt_rounds=4, psp_rounds=4)
    by_weights = data_free.quantize_group(weights, SPECS, options=few)
    assert output_error(weights, result, x) < 0.6 * output_error(weights, by_weights, x)


def test_rotation_and_low_rank_correction_are_those_of_the_weights(
    weights: dict[str, Tensor], x: Tensor
) -> None:
    """OKT and PSP see no inputs: before the refinement, the tensors are the same as without calibration."""
    result = paper.quantize_group(weights, SPECS, moments_of(x), options=replace(QUICK, rounds=1))
    few = data_free.DataFreeOptions(okt_rounds=4, psp_rounds=4)
    by_weights = data_free.quantize_group(weights, SPECS, options=few)
    for name, tensors in result.tensors.items():
        for key in ("rotation_left", "rotation_right", "low_rank_a", "low_rank_b"):
            assert torch.equal(tensors[key], by_weights.tensors[name][key]), key
    assert result.traces["okt"] == by_weights.traces["okt"]
    assert result.traces["psp"] == by_weights.traces["psp"]


def test_the_reported_error_is_that_of_the_stored_tensors(weights: dict[str, Tensor], x: Tensor) -> None:
    options = replace(QUICK, damping=1e-6)
    result = paper.quantize_group(weights, SPECS, moments_of(x), options=options)
    assert result.traces["output"][-1] == pytest.approx(output_error(weights, result, x), rel=1e-2)
    assert len(result.traces["output"]) == options.rounds


def test_each_round_and_each_sweep_lowers_the_error(weights: dict[str, Tensor], x: Tensor) -> None:
    def error(**changes: int) -> float:
        options = replace(QUICK, **changes)  # type: ignore[arg-type]
        return output_error(weights, paper.quantize_group(weights, SPECS, moments_of(x), options=options), x)

    plain, columns = error(rounds=1, sweeps=0), error(rounds=2, sweeps=0)
    assert columns < plain
    refined = [error(rounds=2, sweeps=sweeps) for sweeps in (0, 1, 4)]
    assert all(after < before for before, after in pairwise(refined))


def test_the_factor_b_is_the_least_squares_fit(weights: dict[str, Tensor], x: Tensor) -> None:
    spec = replace(SPECS["q"], out_features=1)
    generator = torch.Generator().manual_seed(0)
    state, _ = paper.start_state(weights, spec, moments_of(x), generator, QUICK)
    state = paper.column_scale_step(paper.binarization_step(state, QUICK.efforts[0], planes=1))
    fitted = paper.row_factor_step(state)
    assert torch.equal(fitted.low_rank_a, state.low_rank_a)

    def error(b: Tensor) -> float:
        a = rotate(state.low_rank_a, state.rotation.left, state.rotation.right) / state.column_scale
        rest = state.target.weight - state.signs.dequantize() - b @ a
        return float(((rest @ state.metric.hessian) * rest).sum())

    best = error(fitted.low_rank_b.float())
    assert best < error(state.low_rank_b.float())
    for factor in (0.97, 1.03):
        assert best < error(factor * fitted.low_rank_b.float())


def test_one_round_has_no_column_scales_and_rank_0_no_correction(
    weights: dict[str, Tensor], x: Tensor
) -> None:
    specs = {name: replace(spec, rank=0) for name, spec in SPECS.items()}
    result = paper.quantize_group(weights, specs, moments_of(x), options=replace(QUICK, rounds=1))
    assert all(bool((tensors["column_scale"] == 1).all()) for tensors in result.tensors.values())
    assert "low_rank_a" not in result.tensors["q"]
    assert result.traces["psp"] == []


def test_same_seed_same_bytes_and_inputs_unchanged(weights: dict[str, Tensor], x: Tensor) -> None:
    moments, copies = moments_of(x), {name: weight.clone() for name, weight in weights.items()}
    gram = moments.gram.clone()
    first, again, other = (
        paper.quantize_group(weights, SPECS, moments, seed=seed, options=QUICK) for seed in (0, 0, 1)
    )
    for name, tensors in first.tensors.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor.view(torch.uint8), again.tensors[name][key].view(torch.uint8))
        assert not torch.equal(tensors["rotation_left"], other.tensors[name]["rotation_left"])
        assert torch.equal(weights[name], copies[name])
    assert torch.equal(moments.gram, gram)
    assert (first.errors, first.traces) == (again.errors, again.traces)


def test_the_clip_is_chosen_by_the_inputs_at_few_bits(weights: dict[str, Tensor], x: Tensor) -> None:
    specs = {name: replace(spec, bits=3) for name, spec in SPECS.items()}
    chosen = paper.quantize_group(weights, specs, moments_of(x), inputs=x[:200], options=QUICK)
    assert chosen.clip is not None
    assert 0 < chosen.clip < 1
    fixed = replace(QUICK, choose_clip=False)
    assert paper.quantize_group(weights, specs, moments_of(x), inputs=x[:200], options=fixed).clip is None


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_inputs_without_information_are_refused(weights: dict[str, Tensor], value: float) -> None:
    with pytest.raises(SourceError, match="calibration: expected finite, nonzero inputs"):
        paper.quantize_group(weights, SPECS, moments_of(torch.full((10, 64), value)), options=QUICK)
