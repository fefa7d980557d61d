"""Recipe `data-free`: the stored tensors are valid, have the reported error, and depend only on seed and names."""

import math
from dataclasses import replace

import pytest
import torch
from bwla_converter.quantize.data_free import DataFreeOptions, quantize_group
from bwla_converter.quantize.group import GroupResult, group_generator
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, unpack_signs, validate_layer
from bwla_kernels.reference import dequantize, linear, rotate
from torch import Tensor

SIZES = (2, 8, 12)
WIDTH = 192
QUICK = DataFreeOptions(okt_rounds=4, psp_rounds=4)
INPUT_TRANSFORM = ("rotation_left", "rotation_right", "column_scale", "low_rank_a")


def group(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return three weights of one input group, with rows and columns of different norms."""
    generator = torch.Generator().manual_seed(11)
    columns = torch.rand(WIDTH, generator=generator) + 0.5
    return {
        f"layers.0.{name}": (torch.randn(rows, WIDTH, generator=generator) * columns * 0.02).to(dtype)
        for name, rows in (("q_proj", 48), ("k_proj", 16), ("v_proj", 17))
    }


def specs_of(weights: dict[str, Tensor], rank: int = 2, **changes: object) -> dict[str, LayerSpec]:
    base = LayerSpec(1, WIDTH, *SIZES, rank=rank)
    return {name: replace(base, out_features=len(w), **changes) for name, w in weights.items()}  # type: ignore[arg-type]


def quantize(rank: int = 2, seed: int = 0, options: DataFreeOptions = QUICK) -> GroupResult:
    return quantize_group(group(), specs_of(group(), rank), seed=seed, options=options)


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_tensors_are_valid_and_have_the_reported_error(rank: int, dtype: torch.dtype) -> None:
    weights = group(dtype)
    specs = specs_of(weights, rank)
    result = quantize_group(weights, specs, options=QUICK)
    assert list(result.tensors) == list(result.errors) == list(weights)
    for name, weight in weights.items():
        validate_layer(name, result.tensors[name], specs[name])
        error = weight.float() - dequantize(result.tensors[name], specs[name])
        assert result.errors[name] == pytest.approx((error.norm() / weight.float().norm()).item(), rel=1e-4)
        assert 0.3 < result.errors[name] < 0.8
    assert (len(result.traces["okt"]), len(result.traces["psp"])) == (5, 5 if rank else 0)
    assert len(result.traces["scales"]) == 13


def test_the_stored_layer_has_the_reported_output_error() -> None:
    """On white inputs the output error is the reported error of the weight."""
    result, weights = quantize(), group()
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(3))
    for name, spec in specs_of(weights).items():
        y = x @ weights[name].t()
        plain = linear(x, result.tensors[name], replace(spec, bits=16))
        torch.testing.assert_close(
            plain, x @ dequantize(result.tensors[name], spec).t(), atol=1e-4, rtol=1e-3
        )
        assert float((plain - y).norm() / y.norm()) == pytest.approx(result.errors[name], rel=0.15)
        six_bits = linear(x, result.tensors[name], spec)
        assert float((six_bits - plain).norm() / plain.norm()) < 0.05


def test_linears_of_a_group_share_the_input_transform() -> None:
    first, *others = quantize().tensors.values()
    for other in others:
        for key in INPUT_TRANSFORM:
            assert torch.equal(first[key], other[key])
            assert first[key].data_ptr() != other[key].data_ptr(), "safetensors refuses shared memory"


def test_rotations_are_orthogonal_to_half_precision() -> None:
    tensors = quantize(options=DataFreeOptions()).tensors["layers.0.q_proj"]
    for key in ("rotation_left", "rotation_right"):
        assert tensors[key].dtype == torch.float16
        gram = tensors[key].double().mT @ tensors[key].double()
        assert (gram - torch.eye(gram.shape[-1])).abs().max() < 2**-10


def test_signs_are_those_of_the_residual_of_the_stored_factors() -> None:
    result, weights = quantize(rank=4), group()
    for name, weight in weights.items():
        t = result.tensors[name]
        low = t["low_rank_b"].float() @ t["low_rank_a"].float()
        residual = rotate(weight - low, t["rotation_left"], t["rotation_right"])
        away = residual.abs() > 1e-6  # rounding may change the sign of a value close to 0
        assert torch.equal((residual > 0)[away], (unpack_signs(t["weight_packed"]) > 0)[away])
        assert away.float().mean() > 0.99


def test_rank_and_rotation_lower_the_error() -> None:
    def mean(result: GroupResult) -> float:
        return sum(result.errors.values()) / len(result.errors)

    full = DataFreeOptions()
    by_rank = [mean(quantize(rank, options=full)) for rank in (0, 1, 4)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[2] < by_rank[0] - 0.02
    assert by_rank[0] < mean(quantize(0, options=replace(full, okt_rounds=0))) - 0.005


@pytest.mark.parametrize("rank", [0, 4])
def test_the_unbiased_layer_preserves_the_projection_on_the_weight(rank: int) -> None:
    """Least-squares scales are closer to W but shrink what the low-rank correction leaves."""
    both = [quantize(rank, options=replace(QUICK, unbiased=choice)) for choice in (True, False)]
    unbiased: list[float] = []
    shrunk: list[float] = []
    for result, gains in zip(both, (unbiased, shrunk), strict=True):
        for name, weight in group().items():
            t, spec = result.tensors[name], specs_of(group(), rank)[name]
            low = t["low_rank_b"].float() @ t["low_rank_a"].float() if rank else torch.zeros_like(weight)
            rest = weight - low
            gains.append(float(((dequantize(t, spec) - low) * rest).sum() / rest.square().sum()))
    assert unbiased == pytest.approx([1.0] * 3, abs=1e-3)
    assert max(shrunk) < 0.75
    assert all(both[1].errors[name] < both[0].errors[name] for name in group())


def test_a_row_mean_takes_one_rank() -> None:
    offset = {name: weight + 0.05 for name, weight in group().items()}
    specs = specs_of(offset, rank=1)
    centred = DataFreeOptions(okt_rounds=0, start="identity", row_mean=True)
    result = quantize_group(offset, specs, options=centred)
    for name, weight in offset.items():
        t = result.tensors[name]
        torch.testing.assert_close(t["low_rank_a"].float(), torch.ones(1, WIDTH))
        means = weight.mean(1, keepdim=True)
        torch.testing.assert_close(t["low_rank_b"].float(), means, rtol=2**-8, atol=0)
    assert result.traces["psp"] == []


def test_a_row_mean_is_that_of_what_the_low_rank_correction_leaves() -> None:
    offset = {name: weight + 0.05 for name, weight in group().items()}
    result = quantize_group(offset, specs_of(offset, rank=3), options=replace(QUICK, row_mean=True))
    for name, weight in offset.items():
        t = result.tensors[name]
        low = t["low_rank_b"].float() @ t["low_rank_a"].float()
        rows = rotate(weight - low, t["rotation_left"], t["rotation_right"])
        assert rows.mean(1).abs().max() < 0.01 * rows.abs().mean()


def test_biases_pass_through() -> None:
    weights = group()
    bias = torch.arange(16).to(torch.bfloat16)
    specs = specs_of(weights, bias=True)
    result = quantize_group(weights, specs, biases={"layers.0.k_proj": bias}, options=QUICK)
    assert torch.equal(result.tensors["layers.0.k_proj"]["bias"], bias)
    validate_layer("k", result.tensors["layers.0.k_proj"], specs["layers.0.k_proj"])
    assert "bias" not in result.tensors["layers.0.q_proj"], "a bias that is not given stays with the caller"


def test_zero_rows_and_zero_weights_are_valid() -> None:
    weights = group()
    weights["layers.0.q_proj"][3] = 0
    weights["layers.0.v_proj"].zero_()
    result = quantize_group(weights, specs_of(weights), options=QUICK)
    spec = specs_of(weights)["layers.0.q_proj"]
    assert dequantize(result.tensors["layers.0.q_proj"], spec)[3].abs().max() < 1e-20
    assert result.errors["layers.0.v_proj"] < 1e-20
    nothing = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    assert max(quantize_group(nothing, specs_of(nothing), options=QUICK).errors.values()) < 1e-20


def test_the_result_depends_only_on_seed_and_names() -> None:
    torch.manual_seed(1)
    first = quantize()
    torch.manual_seed(2)
    torch.rand(3)
    again, other = quantize(), quantize(seed=1)
    renamed = {name.replace("0", "1"): weight for name, weight in group().items()}
    elsewhere = quantize_group(renamed, specs_of(renamed), options=QUICK)
    for name, tensors in first.tensors.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor.view(torch.uint8), again.tensors[name][key].view(torch.uint8))
        left = tensors["rotation_left"]
        assert not torch.equal(left, other.tensors[name]["rotation_left"])
        assert not torch.equal(left, elsewhere.tensors[name.replace("0", "1")]["rotation_left"])
    assert (first.errors, first.traces) == (again.errors, again.traces)


def test_the_generator_is_the_same_in_every_process() -> None:
    """Python's hash() differs from run to run; the number is SHA-256 of "0\\na\\nb" cut to 63 bits."""
    assert group_generator(0, ["a", "b"]).initial_seed() == 5910630467023845803
    assert group_generator(0, ["a", "b"]).initial_seed() != group_generator(0, ["ab"]).initial_seed()


def test_the_weights_are_not_modified() -> None:
    weights = group()
    copies = {name: weight.clone() for name, weight in weights.items()}
    quantize_group(weights, specs_of(weights), options=QUICK)
    assert all(torch.equal(weights[name], copies[name]) for name in copies)


def test_strides_do_not_matter() -> None:
    weights = group()
    strided = {name: weight.t().contiguous().t() for name, weight in weights.items()}
    plain, other = (quantize_group(w, specs_of(w), options=QUICK) for w in (weights, strided))
    assert plain.errors == pytest.approx(other.errors, rel=1e-4)


def test_bad_groups_are_refused() -> None:
    weights, specs = group(), specs_of(group())
    spoiled = {**weights, "layers.0.k_proj": weights["layers.0.k_proj"].clone()}
    spoiled["layers.0.k_proj"][2, 5] = math.nan
    with pytest.raises(
        SourceError, match=r"layers\.0\.k_proj\.weight: expected finite values, found 1 of 3072"
    ):
        quantize_group(spoiled, specs)
    narrow = {**weights, "layers.0.k_proj": torch.zeros(16, 191)}
    with pytest.raises(SourceError, match=r"k_proj\.weight: expected shape \[16, 192\], found \[16, 191\]"):
        quantize_group(narrow, specs)
    with pytest.raises(SourceError, match=r"k_proj\.weight: expected dtype .*, found int8"):
        quantize_group({**weights, "layers.0.k_proj": torch.zeros(16, WIDTH, dtype=torch.int8)}, specs)
    with pytest.raises(SourceError, match=r"k_proj: expected the same input transform as"):
        quantize_group(weights, {**specs, "layers.0.k_proj": replace(specs["layers.0.k_proj"], rank=1)})
    with pytest.raises(SourceError, match="expected a rank of at most 81, found 82"):
        quantize_group(weights, specs_of(weights, rank=82))
    with pytest.raises(SourceError, match=r"o_proj: expected both a weight and a spec"):
        quantize_group(weights, {**specs, "layers.0.o_proj": specs["layers.0.q_proj"]})
    with pytest.raises(SourceError, match=r"k_proj\.bias: expected shape \[16\], found \[15\]"):
        quantize_group(weights, specs, biases={"layers.0.k_proj": torch.zeros(15)})
    with pytest.raises(SourceError, match="at least one weight"):
        quantize_group({}, {})
