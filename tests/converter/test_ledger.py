"""The bits ledger: every stored bit is counted, and the automatic rank stays within its budget."""

import pytest
from bwla_converter.ledger import AUTO_RANK_BITS, auto_rank, bits_per_weight, stored_bits
from bwla_kernels.format import LayerSpec


def test_every_stored_bit_is_counted(make_layer) -> None:
    spec = LayerSpec(40, 192, 2, 8, 12, rank=3, bias=True)
    stored = make_layer(spec, 0)
    by_hand = sum(8 * t.numel() * t.element_size() for name, t in stored.items() if name != "bias")
    assert stored_bits(spec) == by_hand
    assert bits_per_weight([spec, spec]) == pytest.approx(by_hand / (40 * 192))


def test_auto_rank_is_the_largest_that_fits() -> None:
    specs = [
        LayerSpec(2048, 2048, 1, 32, 64),
        LayerSpec(5632, 2048, 1, 32, 64),
        LayerSpec(2048, 5632, 8, 22, 32),
    ]
    rank = auto_rank(specs)
    assert rank > 0

    def total(r: int) -> float:
        return bits_per_weight([LayerSpec(**{**spec.__dict__, "rank": r}) for spec in specs])

    assert total(rank) <= AUTO_RANK_BITS < total(rank + 1)


def test_auto_rank_is_zero_where_even_rank_one_does_not_fit() -> None:
    assert auto_rank([LayerSpec(64, 64, 1, 8, 8)]) == 0


def test_auto_rank_never_exceeds_a_layer() -> None:
    assert auto_rank([LayerSpec(8, 8192, 1, 64, 128), LayerSpec(8192, 8192, 1, 64, 128)], budget=9.0) == 8
