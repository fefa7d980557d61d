"""Bits per weight: everything stored is counted, and the automatic rank stays within its budget."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from bwla_converter.common.bits import (
    AUTO_RANK_BITS_PER_WEIGHT,
    auto_rank,
    bits_per_weight,
    describe_planes,
    describe_rank,
    largest_fitting_rank,
    stored_bits,
    total_bits,
)
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec


def named(specs: Sequence[LayerSpec]) -> dict[str, LayerSpec]:
    return {f"layer.{index}": spec for index, spec in enumerate(specs)}


def test_every_stored_bit_is_counted(make_layer) -> None:
    spec = LayerSpec(40, 192, 2, 8, 12, rank=3, bias=True)
    stored = make_layer(spec, 0)
    by_hand = sum(8 * t.numel() * t.element_size() for name, t in stored.items() if name != "bias")
    assert stored_bits("q_proj", spec) == by_hand
    assert bits_per_weight({"q_proj": spec, "k_proj": spec}) == pytest.approx(by_hand / (40 * 192))


def test_the_input_transform_of_experts_counts_once() -> None:
    spec = LayerSpec(40, 192, 2, 8, 12, rank=3)
    names = [f"mlp.experts.{number}.down_proj" for number in range(3)]
    first, *others = (stored_bits(name, spec) for name in names)
    assert first == stored_bits("down_proj", spec)
    row_bits = 40 * (192 + 16 + 3 * 16)
    assert others == [row_bits] * 2
    assert total_bits(dict.fromkeys(names, spec)) == first + 2 * row_bits


def test_the_fitting_rank_is_the_largest_that_fits() -> None:
    specs = [
        LayerSpec(2048, 2048, 1, 32, 64),
        LayerSpec(5632, 2048, 1, 32, 64),
        LayerSpec(2048, 5632, 8, 22, 32),
    ]
    rank = largest_fitting_rank(named(specs))
    assert rank > 0

    def total(r: int) -> float:
        return bits_per_weight(named([replace(spec, rank=r) for spec in specs]))

    assert total(rank) <= AUTO_RANK_BITS_PER_WEIGHT < total(rank + 1)


def test_no_rank_where_even_rank_one_does_not_fit() -> None:
    assert largest_fitting_rank(named([LayerSpec(64, 64, 1, 8, 8)])) == 0


def test_the_fitting_rank_never_exceeds_a_layer() -> None:
    specs = [LayerSpec(8, 8192, 1, 64, 128), LayerSpec(8192, 8192, 1, 64, 128)]
    assert largest_fitting_rank(named(specs), budget=9.0) == 8


@pytest.mark.parametrize(
    ("fitting", "chosen"),
    [
        *((rank, rank) for rank in (0, 1, 2, 5, 10, 15, 16, 24, 30, 31, 32, 40, 47, 64)),
        *((17, 16), (23, 16), (35, 32), (39, 32), (50, 48)),
    ],
)
def test_auto_rank_drops_a_step_that_is_less_than_half_full(fitting: int, chosen: int) -> None:
    assert auto_rank(fitting) == chosen


def test_auto_rank_of_qwen3_32b() -> None:
    """q, k, v, o, gate, up and down: rank 35 fits the budget but costs a GPU as much as 48."""
    sizes = [(8192, 5120, 1), (1024, 5120, 1), (1024, 5120, 1), (5120, 8192, 8)]
    sizes += [(25600, 5120, 1), (25600, 5120, 1), (5120, 25600, 8)]
    specs = [LayerSpec(n, k, *choose_rotation(k, groups)) for n, k, groups in sizes]
    assert largest_fitting_rank(named(specs)) == 35
    assert auto_rank(35) == 32


def test_the_choice_is_described() -> None:
    assert describe_rank(32, 35) == "rank 32 (35 would fit, but a GPU would read 48 columns)"
    assert describe_rank(5, 5) == "rank 5"


def test_planes_are_counted_in_words() -> None:
    assert [describe_planes(count) for count in (1, 2)] == ["1 binary plane", "2 binary planes"]
