"""The repacked weights hold the same signs, where the kernels look for them."""

import pytest
import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.format import pack_signs
from bwla_kernels.triton.layout import (
    chunk_columns,
    chunk_layout,
    pack_planes,
    repack_weights,
    unpack_weights,
)

SHAPES = [(5, 1, 256), (130, 2, 128), (3, 3, 96), (1030, 1, 544), (128, 5, 384)]


PLANES = pytest.mark.parametrize("planes", [1, 2, 3, 4])


def random_signs(n: int, k: int, planes: int = 1) -> torch.Tensor:
    """Draw signs [N, P, K]."""
    generator = torch.Generator().manual_seed(n + k)
    return torch.randint(0, 2, (n, planes, k), generator=generator, dtype=torch.int8) * 2 - 1


def stored(signs: torch.Tensor) -> torch.Tensor:
    """Pack signs as a checkpoint does, where a single plane has no axis."""
    return pack_signs(signs.squeeze(1) if signs.shape[1] == 1 else signs)


@PLANES
@pytest.mark.parametrize(("n", "blocks", "width"), SHAPES)
def test_round_trip(n: int, blocks: int, width: int, planes: int) -> None:
    layout = chunk_layout(n, blocks, width, planes)
    signs = random_signs(n, blocks * width, planes)
    packed = repack_weights(stored(signs), layout)
    rows = -(-n // 128) * 128
    assert packed.shape == (blocks * -(-width // layout.chunk), rows * planes, layout.chunk // 8)
    assert torch.equal(unpack_weights(packed, layout), signs)
    some = torch.tensor([n - 1, 0, n // 2])
    assert torch.equal(unpack_weights(packed, layout, some), signs[some])
    all_rows = packed.view(layout.tiles).transpose(2, 3).flatten(1, 2)
    assert not all_rows[:, n:].any()


@PLANES
@pytest.mark.parametrize(("n", "blocks", "width"), SHAPES)
def test_every_bit_is_where_the_layout_says(n: int, blocks: int, width: int, planes: int) -> None:
    layout = chunk_layout(n, blocks, width, planes)
    signs = random_signs(n, blocks * width, planes)
    packed = repack_weights(stored(signs), layout)
    span = layout.chunk // 8
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        row, plane, column = (
            int(torch.randint(0, top, (), generator=generator)) for top in (n, planes, blocks * width)
        )
        g, inside = divmod(column, width)
        t, rest = divmod(inside, layout.chunk)
        j, b = divmod(rest, span)
        at = row // 16 * 16 * planes + 16 * plane + row % 16
        byte = int(packed[g * layout.chunks_per_group + t, at, b])
        assert (byte >> j) & 1 == (signs[row, plane, column] > 0)


def test_memory_is_the_packed_bytes() -> None:
    layout = chunk_layout(1024, 1, 5120)
    assert repack_weights(torch.zeros(1024, 160, dtype=torch.int32), layout).nbytes == 1024 * 5120 // 8


@pytest.mark.parametrize(("width", "chunk"), [(256, 256), (128, 128), (3200, 128), (64, 256), (5120, 256)])
def test_chunk_columns(width: int, chunk: int) -> None:
    assert chunk_columns(width) == chunk


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize(("blocks", "width"), [(2, 96), (1, 128), (1, 256)])
def test_planes_add_up_to_the_codes(bits: int, blocks: int, width: int) -> None:
    """Two's complement, in the weights' layout: planes with their powers of two give the codes back."""
    layout = chunk_layout(1, blocks, width)
    top = (1 << (bits - 1)) - 1
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(-top, top + 1, (3, blocks * width), generator=generator, dtype=torch.int8)
    planes = pack_planes(q, bits, layout)
    assert planes.shape == (3, bits, layout.chunks, layout.chunk // 32)
    total = torch.zeros(3, blocks * width, dtype=torch.int32)
    for i in range(bits):
        rows = planes[:, i].reshape(3, layout.chunks, -1).transpose(0, 1).contiguous().view(torch.uint8)
        whole = torch.nn.functional.pad(rows, (0, 0, 0, 128 - 3))
        found = unpack_weights(whole, chunk_layout(3, blocks, width)).squeeze(1) > 0
        total += found.int() * (-(1 << i) if i == bits - 1 else 1 << i)
    assert torch.equal(total, q.int())


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(
        BackendError, match="multiple of 32 columns, found 4 rows of 1 planes and 1 groups of 40"
    ):
        chunk_layout(4, 1, 40)
    with pytest.raises(BackendError, match=r"int32 \[4, 2, 8\], found torch.int32 \[4, 8\]"):
        repack_weights(torch.zeros(4, 8, dtype=torch.int32), chunk_layout(4, 1, 256, 2))
    with pytest.raises(BackendError, match=r"int32 \[4, 8\], found torch.int32 \[4, 4\]"):
        repack_weights(torch.zeros(4, 4, dtype=torch.int32), chunk_layout(4, 1, 256))
