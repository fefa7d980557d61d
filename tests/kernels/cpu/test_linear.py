"""Both sides of the layer, and the whole, against float64; the promises about threads, rows and memory."""

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.cpu.backend import CpuBackend
from bwla_kernels.cpu.library import Isa
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec, to_storage_dtype, unpack_signs
from torch import Tensor

FLOAT_EPS = torch.finfo(torch.float32).eps
FULL = LayerSpec(150, 1920, 2, 24, 40, rank=5, bias=True)
ROWS = 9


def random_x(tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[tokens, width] with scales of their own and, among many rows, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) * torch.logspace(-3, 2, max(tokens, 1))[:tokens, None]
    x[3:4] = 0
    return x.to(dtype)


def assert_prepared(
    x: Tensor, layer: dict[str, Tensor], spec: LayerSpec, q: Tensor, scale: Tensor, u: Tensor
) -> None:
    """Every code is the rounding of the exact value, up to what float32 sums may be off."""
    exact = {name: tensor.double() for name, tensor in layer.items() if tensor.is_floating_point()}
    x_hat = x.double()
    if not spec.grouped:
        x_hat = (
            reference.rotate(x_hat, exact["rotation_left"], exact["rotation_right"]) * exact["column_scale"]
        )
    cells = x_hat.unflatten(1, (spec.rotation_groups, spec.group_width))
    want = cells.abs().amax(-1) * spec.clip / spec.q_max
    torch.testing.assert_close(scale.double(), want, rtol=2e-6 * spec.group_width**0.5, atol=0)
    ratio = torch.where(want[..., None] > 0, cells / want[..., None], torch.zeros_like(cells))
    off = (q.double().view_as(cells) - ratio.clamp(-spec.q_max, spec.q_max)).abs()
    assert off.max() <= 0.5 + 4e-6 * spec.q_max * spec.group_width**0.5
    if spec.rank:
        terms = x.double().abs() @ exact["low_rank_a"].abs().t()
        assert ((u - x.double() @ exact["low_rank_a"].t()).abs() <= 64 * FLOAT_EPS * terms + 1e-30).all()


def exact_output(
    q: Tensor, scale: Tensor, u: Tensor, layer: dict[str, Tensor], spec: LayerSpec
) -> tuple[Tensor, Tensor]:
    """The GEMM in float64 without the bias, and the sum of the magnitudes of its terms."""
    shape = (spec.rotation_groups, spec.group_width)
    planes = (spec.out_features, spec.planes)
    signs = unpack_signs(layer["weight_packed"], torch.float64).reshape(*planes, *shape)
    sums = torch.einsum("mgk,npgk->mgnp", q.double().unflatten(1, shape), signs)
    blocks = sums * scale.double()[..., None, None]
    alpha = layer["weight_scale"].double().view(*planes, -1).movedim(-1, 0)
    y, size = (blocks * alpha).sum((1, 3)), (blocks.abs() * alpha).sum((1, 3))
    if spec.rank:
        b = layer["low_rank_b"].double()
        y, size = y + u.double() @ b.t(), size + u.double().abs() @ b.t().abs()
    return y, size


@pytest.mark.parametrize("seed", range(8))
def test_random_layers(variants: list[Isa], cases, make_layer, seed: int) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for number, (spec, tokens, threads) in enumerate(cases(100 + seed, 15)):
        layer, x = make_layer(spec, number), random_x(tokens, spec.in_features, number, dtypes[number % 3])
        for isa in variants:
            where = (isa, spec, tokens, threads)
            packed = kernel.pack(layer, spec, isa)
            q, scale, u = kernel.prepare_input(x, packed, spec, isa, threads)
            assert_prepared(x, layer, spec, q, scale, u)
            y = kernel.binary_matmul(q, scale, u, packed, spec, isa=isa, threads=threads)
            want, size = exact_output(q, scale, u, layer, spec)
            terms = spec.planes * spec.rotation_groups + spec.rank + 4
            assert ((y - want).abs() <= terms * FLOAT_EPS * size).all(), where
            whole = kernel.linear(x, packed, spec, isa=isa, threads=threads)
            assert whole.dtype == x.dtype
            assert torch.equal(whole, y.to(x.dtype)), where


@pytest.mark.parametrize("bits", [2, 6, 8])
@pytest.mark.parametrize("shape", [(1, 64, 80), (8, 40, 80), (1, 37, 96), (1, 2, 320)])
def test_wide_layers(variants: list[Isa], make_layer, shape: tuple[int, int, int], bits: int) -> None:
    blocks, n1, n2 = shape
    spec = LayerSpec(20, blocks * n1 * n2, blocks, n1, n2, rank=16, bits=bits)
    layer, x = make_layer(spec, bits), random_x(6, spec.in_features, bits, torch.bfloat16)
    for isa in variants:
        packed = kernel.pack(layer, spec, isa)
        assert_prepared(x, layer, spec, *kernel.prepare_input(x, packed, spec, isa))


@pytest.fixture
def full(isa: Isa, make_layer) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A layer with everything, packed for the variant, and the outputs of nine rows."""
    layer = make_layer(FULL, 5)
    packed = kernel.pack(layer, FULL, isa)
    return layer, packed, kernel.linear(random_x(ROWS, FULL.in_features, 6), packed, FULL, layer["bias"], isa)


@pytest.mark.parametrize("threads", [-1, -2, -3, -5, -16, 2])
def test_the_number_of_threads_changes_nothing(isa: Isa, full, threads: int) -> None:
    layer, packed, want = full
    x = random_x(ROWS, FULL.in_features, 6)
    assert torch.equal(kernel.linear(x, packed, FULL, layer["bias"], isa, threads), want)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_other_rows_change_nothing(isa: Isa, full, count: int) -> None:
    layer, packed, want = full
    x = random_x(ROWS, FULL.in_features, 6)
    for start in range(0, ROWS - count + 1, 2):
        part = slice(start, start + count)
        assert torch.equal(kernel.linear(x[part], packed, FULL, layer["bias"], isa, -2), want[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bias_of_any_dtype(isa: Isa, full, dtype: torch.dtype) -> None:
    layer, packed, _ = full
    x, bias = random_x(ROWS, FULL.in_features, 6), layer["bias"].to(dtype)
    plain = kernel.linear(x, packed, FULL, isa=isa)
    assert torch.equal(kernel.linear(x, packed, FULL, bias, isa), plain + bias.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_strided_shifted_and_shaped_inputs(isa: Isa, full, dtype: torch.dtype) -> None:
    layer, packed, _ = full
    x = random_x(6, FULL.in_features, 7, dtype)
    want = kernel.linear(x, packed, FULL, layer["bias"], isa)
    wide = torch.zeros(6, FULL.in_features + 7, dtype=dtype)
    wide[:, 3:-4] = x  # rows apart, and not aligned to anything
    columns = x.t().contiguous().t()
    for same in (wide[:, 3:-4], columns, x.view(2, 3, -1), x.view(2, 3, -1).transpose(0, 1)):
        y = kernel.linear(same, packed, FULL, layer["bias"], isa)
        assert y.shape == (*same.shape[:-1], FULL.out_features)
        flat = y.transpose(0, 1) if y.dim() == 3 and y.shape[0] == 3 else y
        assert torch.equal(flat.reshape(6, -1), want)


def test_the_packed_layer_may_lie_anywhere(isa: Isa, full) -> None:
    layer, packed, want = full
    moved = torch.empty(packed.numel() + 4, dtype=torch.uint8)[4:]
    moved.copy_(packed)
    x = random_x(ROWS, FULL.in_features, 6)
    assert torch.equal(kernel.linear(x, moved, FULL, layer["bias"], isa), want)


def test_no_rows(isa: Isa, full) -> None:
    layer, packed, _ = full
    y = kernel.linear(torch.zeros(0, FULL.in_features), packed, FULL, layer["bias"], isa)
    assert y.shape == (0, FULL.out_features)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("threads", [-1, -3])
def test_nan_and_infinity_are_not_hidden(isa: Isa, full, bad: float, threads: int) -> None:
    layer, packed, want = full
    x = random_x(ROWS, FULL.in_features, 6)
    x[2, 100] = bad
    y = kernel.linear(x, packed, FULL, layer["bias"], isa, threads)
    assert not y[2].isfinite().any()
    others = [row for row in range(ROWS) if row != 2]
    assert torch.equal(y[others], want[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_round_to_nearest_even(isa: Isa, dtype: torch.dtype) -> None:
    """The epilogue's own rounding: scale 1 and one block of zeros leave the bias, as float32, to be rounded."""
    spec = LayerSpec(3 * 2**12 + 5, 32, 1, 1, 32, bias=True)
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(2**31), 2**31, (spec.out_features,), generator=generator)
    # Just below, at and just above the ties of both types, after odd and after even bits.
    low = torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x3000])
    bits[::2] = (bits[::2] >> 16 << 16) + low[
        torch.randint(0, len(low), bits[::2].shape, generator=generator)
    ]
    special = [0.0, -0.0, 65504.0, 65520.0, 1e-8, 3e-8, 6e-5, 3.5e38, 1e-45, float("inf"), float("nan")]
    bias = torch.cat([bits.to(torch.int32).view(torch.float32)[len(special) :], torch.tensor(special)])
    layer = {
        "weight_packed": torch.zeros(spec.out_features, 1, dtype=torch.int32),
        "weight_scale": torch.ones(spec.out_features),
        "rotation_left": torch.ones(1, 1, 1),
        "rotation_right": torch.eye(32).unsqueeze(0),
        "column_scale": torch.ones(32),
    }
    packed = kernel.pack(to_storage_dtype(layer, spec), spec, isa)
    y = kernel.linear(torch.zeros(1, 32, dtype=dtype), packed, spec, bias, isa)[0]
    torch.testing.assert_close(y, bias.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_op_is_registered_correctly(make_layer) -> None:
    layer, backend = make_layer(FULL, 8), CpuBackend()
    prepared, x = backend.prepare(layer, FULL), random_x(3, FULL.in_features, 9)
    sizes = (
        FULL.out_features,
        FULL.rotation_groups,
        FULL.n1,
        FULL.n2,
        FULL.rank,
        FULL.bits,
        FULL.clip,
        1,
        False,
    )
    torch.library.opcheck(
        torch.ops.bwla.linear_cpu.default, (x, prepared["packed"], prepared["bias"], *sizes)
    )


def test_large_layers_lie_on_huge_pages_of_their_own() -> None:
    packed = kernel.empty_huge(5 << 20)
    assert packed.shape == (5 << 20,)
    assert packed.data_ptr() % kernel.HUGE_PAGE == 0
    packed.fill_(7)
    assert packed.sum(dtype=torch.int64) == 7 * (5 << 20)


def test_what_does_not_fit_is_refused_in_words(make_layer) -> None:
    layer = make_layer(FULL, 5)
    packed = kernel.pack(layer, FULL)
    x = random_x(2, FULL.in_features, 1)
    with pytest.raises(BackendError, match=r"x: expected .*1920.* found torch.float64"):
        kernel.linear(x.double(), packed, FULL)
    with pytest.raises(BackendError, match=r"x: expected .*1920.* found torch.float32 \[2, 1919\]"):
        kernel.linear(x[:, 1:], packed, FULL)
    with pytest.raises(BackendError, match=r"packed: expected .* pack the layer with this spec"):
        kernel.linear(x, packed[1:], FULL)
    with pytest.raises(BackendError, match="bias: expected"):
        kernel.linear(x, packed, FULL, layer["bias"][1:])
    with pytest.raises(BackendError, match="weight_scale: expected contiguous torch.bfloat16"):
        kernel.pack({**layer, "weight_scale": layer["weight_scale"].double()}, FULL)
    able, reason = kernel.can_implement(LayerSpec(8, 64, 1, 8, 8, bits=16))
    assert not able
    assert "quantized activations" in reason
