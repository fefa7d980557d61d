"""Factor the rotation of K columns into G rotation groups of n1 x n2 columns (see docs/format.md)."""

from bwla_kernels.errors import FormatError

PACK_FACTOR = 32
"""Signs in one int32 word; rotation groups are whole words, so that no word straddles two activation scales."""

MAX_FACTOR = 128
"""Largest n1 or n2 that a GPU kernel holds in registers and shared memory."""

RANK_STEP = 16
"""Columns of the low-rank factor B that the GPU kernels read at a time: a rank costs as much as the next multiple."""

SHARDED_ROTATION_GROUPS = 8
"""Preferred number of rotation groups where tensor parallelism shards the input: each of 1, 2, 4 or 8 tensor-parallel
ranks then holds whole groups."""


def factor_pair(width: int) -> tuple[int, int] | None:
    """Split `width` into n1 <= n2 <= 128, balanced, preferring two multiples of 8.

    A pair of multiples of 8 wins while n2 is at most four times n1: a kernel pads other sizes,
    and beyond that ratio the arithmetic (n1 + n2 multiplications for each element) costs more than padding.
    Return None where no divisor fits.
    """
    pairs = [(n1, width // n1) for n1 in range(1, int(width**0.5) + 1) if width % n1 == 0]
    pairs = [pair for pair in pairs if pair[1] <= MAX_FACTOR]
    if not pairs:
        return None
    aligned = [(n1, n2) for n1, n2 in pairs if n1 % 8 == 0 and n2 % 8 == 0 and n2 <= 4 * n1]
    return max(aligned or pairs)


def choose_rotation(in_features: int, preferred_rotation_groups: int = 1) -> tuple[int, int, int]:
    """Choose (G, n1, n2) for an input of width K = `in_features`.

    G is the largest count <= `preferred_rotation_groups` that divides K into whole 32-bit words and factors;
    where none does (K = 25600 is too wide for one group), the smallest larger one.

    Raises:
        FormatError: K is not a positive multiple of 32, or has no factors up to 128.
    """
    if in_features <= 0 or in_features % PACK_FACTOR:
        raise FormatError(
            f"an input width must be a positive multiple of {PACK_FACTOR}, found {in_features}: "
            "exclude the layer from quantization with --ignore"
        )
    words = in_features // PACK_FACTOR
    below = range(min(preferred_rotation_groups, words), 0, -1)
    above = range(preferred_rotation_groups + 1, words + 1)
    for groups in (*below, *above):
        if words % groups:
            continue
        # Tensor-parallel sizes are powers of two and must divide the groups: other counts only as a last resort.
        if groups < preferred_rotation_groups and groups & (groups - 1):
            continue
        pair = factor_pair(in_features // groups)
        if pair is not None:
            return groups, *pair
    raise FormatError(
        f"input width {in_features} has no factors n1, n2 <= {MAX_FACTOR}: "
        "exclude the layer from quantization with --ignore"
    )
