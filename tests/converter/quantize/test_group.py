"""Input groups: what is stored dequantizes to what was given, errors are those of the tensors, bad input is refused."""

from dataclasses import replace

import pytest
import torch
from bwla_converter.common import tensors as chunks
from bwla_converter.quantize.group import check_group, group_generator, pool_rows, relative_error, store_group
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, unpack_signs, validate_layer
from bwla_kernels.reference import dequantize
from random_tensors import normal
from torch import Tensor

WIDTH, RANK = 64, 3
SPECS = {name: LayerSpec(rows, WIDTH, 1, 8, 8, rank=RANK) for name, rows in (("q", 24), ("k", 8), ("v", 9))}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        name: normal(spec.out_features, WIDTH, seed=i).to(dtype)
        for i, (name, spec) in enumerate(SPECS.items())
    }


def stored(biases: dict[str, Tensor] | None = None) -> tuple[dict[str, dict[str, Tensor]], Tensor, Tensor]:
    """The tensors of a group in the original basis, with the rows and the row scales that they come from."""
    rows = pool_rows(weights().values())
    scale = rows.abs().mean(1)
    input_transform = {
        "rotation_left": torch.eye(8).unsqueeze(0),
        "rotation_right": torch.eye(8).unsqueeze(0),
        "column_scale": torch.ones(WIDTH),
        "low_rank_a": normal(RANK, WIDTH, seed=8).bfloat16(),
    }
    low_rank_b = normal(len(rows), RANK, seed=9).bfloat16()
    return store_group(weights(), SPECS, biases or {}, input_transform, rows, scale, low_rank_b), rows, scale


def test_every_linear_stores_its_own_rows() -> None:
    group, rows, scale = stored()
    first = 0
    for name, spec in SPECS.items():
        own = slice(first, first + spec.out_features)
        first = own.stop
        validate_layer(name, group[name], spec)
        assert torch.equal(unpack_signs(group[name]["weight_packed"]) > 0, rows[own] >= 0)
        assert torch.equal(group[name]["weight_scale"], scale[own].bfloat16())


def test_shared_tensors_are_equal_but_do_not_share_memory() -> None:
    group, _, _ = stored()
    for key in ("rotation_left", "rotation_right", "column_scale", "low_rank_a"):
        assert all(torch.equal(group["q"][key], group[name][key]) for name in SPECS)
        assert len({group[name][key].data_ptr() for name in SPECS}) == len(SPECS)


def test_only_given_biases_are_stored() -> None:
    group, _, _ = stored({"k": torch.ones(8)})
    assert [name for name in SPECS if "bias" in group[name]] == ["k"]


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_the_relative_error_is_that_of_the_dequantized_tensors(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, _, _ = stored()
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", chunk_rows * WIDTH)
    for name, weight in weights().items():
        expected = (weight - dequantize(group[name], SPECS[name])).norm() / weight.norm()
        assert relative_error(weight, group[name], SPECS[name]) == pytest.approx(float(expected), rel=1e-5)
    zeros = torch.zeros(24, WIDTH)
    absolute = float(dequantize(group["q"], SPECS["q"]).norm())
    assert relative_error(zeros, group["q"], SPECS["q"]) == pytest.approx(absolute, rel=1e-5)


def test_the_generator_depends_on_seed_and_names_alone() -> None:
    seeds = [
        group_generator(seed, names).initial_seed()
        for seed, names in ((0, ["a", "b"]), (1, ["a", "b"]), (0, ["ab"]), (0, ["b", "a"]))
    ]
    assert len(set(seeds)) == len(seeds)
    assert group_generator(0, ["a", "b"]).initial_seed() == seeds[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_sound_group_gives_the_spec_of_its_input_transform(dtype: torch.dtype) -> None:
    specs = {name: replace(spec, bias=name == "q") for name, spec in SPECS.items()}
    expected = LayerSpec(1, WIDTH, 1, 8, 8, rank=RANK)
    assert check_group(weights(dtype), {"q": torch.zeros(24)}, specs) == expected


def spoiled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = weights(dtype)["k"]
    weight[2, 5] = value
    return weight


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("k", spoiled(float("nan")), r"k\.weight: expected finite values, found 1 of 512 NaN or infinite"),
        ("k", spoiled(float("inf")), r"k\.weight: expected finite values, found 1 of 512 NaN or infinite"),
        ("k", spoiled(1e300, torch.float64), r"k\.weight: expected finite values"),
        ("v", torch.zeros(9, 63), r"v\.weight: expected shape \[9, 64\], found \[9, 63\]"),
        ("v", torch.zeros(9, 64, dtype=torch.int8), r"v\.weight: expected dtype .*, found int8"),
    ],
)
def test_a_bad_weight_is_named_with_its_problem(name: str, weight: Tensor, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        check_group({**weights(), name: weight}, {}, SPECS)


def test_parts_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(SourceError, match="expected at least one weight"):
        check_group({}, {}, {})
    with pytest.raises(SourceError, match="k: expected the same input transform as q"):
        check_group(weights(), {}, {**SPECS, "k": replace(SPECS["k"], bits=4)})
    with pytest.raises(SourceError, match=r"k\.bias: expected shape \[8\], found \[7\]"):
        check_group(weights(), {"k": torch.zeros(7)}, SPECS)
    with pytest.raises(SourceError, match="q, k, v: expected a rank of at most 41, found 42"):
        check_group(weights(), {}, {name: replace(spec, rank=42) for name, spec in SPECS.items()})


def test_of_several_unmatched_names_the_first_in_order_is_named() -> None:
    """Sets of strings iterate in an order that changes from process to process."""
    extra = {f"o{i}": SPECS["q"] for i in range(20)}
    with pytest.raises(SourceError, match="^o0: expected both a weight and a spec"):
        check_group(weights(), {}, {**SPECS, **extra})
