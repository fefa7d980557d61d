"""Factor choice: the sizes that the design names, and the rules for all others."""

import pytest
from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import MAX_FACTOR, choose_rotation


@pytest.mark.parametrize(
    ("width", "blocks", "expected"),
    [
        (5120, 1, (1, 64, 80)),
        (8192, 8, (8, 32, 32)),
        (25600, 8, (8, 40, 80)),
        (4096, 1, (1, 64, 64)),
        (11008, 8, (8, 32, 43)),
        (192, 8, (2, 8, 12)),
    ],
)
def test_known_widths(width: int, blocks: int, expected: tuple[int, int, int]) -> None:
    assert choose_rotation(width, blocks) == expected


@pytest.mark.parametrize("preferred", [1, 8])
def test_every_choice_covers_the_width_in_whole_words(preferred: int) -> None:
    refused = []
    for width in range(32, 8193, 32):
        try:
            blocks, n1, n2 = choose_rotation(width, preferred)
        except FormatError:
            refused.append(width)
            continue
        assert blocks * n1 * n2 == width
        assert n1 * n2 % 32 == 0
        assert n1 <= n2 <= MAX_FACTOR
    # Only widths with a prime factor above 128 cannot be factored.
    assert all(
        any(width % p == 0 and all(p % d for d in range(2, int(p**0.5) + 1)) for p in range(131, width + 1))
        for width in refused
    )


def test_a_width_too_wide_for_one_block_gets_more() -> None:
    blocks, _, n2 = choose_rotation(25600, 1)
    assert blocks > 1
    assert n2 <= MAX_FACTOR


@pytest.mark.parametrize("width", [0, -32, 33, 100])
def test_widths_that_are_no_multiple_of_32_are_refused(width: int) -> None:
    with pytest.raises(FormatError, match="multiple of 32"):
        choose_rotation(width)
