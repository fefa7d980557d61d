"""Sign packing: exact round trips and the bit order that the format promises."""

import pytest
import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import pack_signs, unpack_signs
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 70), words=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_round_trip_is_exact_for_any_n_and_any_multiple_of_32(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (rows, 32 * words), generator=generator, dtype=torch.int8) * 2 - 1
    packed = pack_signs(signs)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words)
    assert torch.equal(unpack_signs(packed), signs)


@pytest.mark.parametrize("column", [0, 1, 30, 31, 32, 63])
def test_bit_j_of_word_i_is_column_32_i_plus_j(column: int) -> None:
    signs = -torch.ones(1, 64)
    signs[0, column] = 1
    words = [word & 0xFFFFFFFF for word in pack_signs(signs)[0].tolist()]
    assert words[column // 32] == 1 << (column % 32)
    assert words[1 - column // 32] == 0


def test_zero_counts_as_minus_one() -> None:
    assert pack_signs(torch.zeros(1, 32)).item() == 0


def test_widths_that_are_no_multiple_of_32_are_refused() -> None:
    with pytest.raises(FormatError, match="multiple of 32"):
        pack_signs(torch.ones(2, 40))
    with pytest.raises(FormatError, match="int32"):
        unpack_signs(torch.ones(2, 2))
