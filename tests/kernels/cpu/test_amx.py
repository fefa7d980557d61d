"""The AMX variant, which multiplies many tokens: the same bits as table lookup, and no trace in the thread."""

import random

import pytest
import torch
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.cpu.library import Isa
from bwla_kernels.format import LayerSpec
from torch import Tensor

BITS = {2: torch.int16, 4: torch.int32}
MANY = 12
"""Tokens from which the variant uses AMX (kAmxTokens in plan.h)."""


@pytest.fixture(autouse=True)
def _amx(variants: list[Isa]) -> None:
    if Isa.AMX not in variants:
        pytest.skip("this processor, system or compiler has no AMX")


def assert_same_bits(
    x: Tensor, layer: dict[str, Tensor], spec: LayerSpec, bias: Tensor | None = None, threads: int = -1
) -> Tensor:
    """Compute the layer by table lookup and with AMX, and compare every bit, those of NaN included."""
    packed = kernel.pack(layer, spec, Isa.AMX)
    assert torch.equal(packed, kernel.pack(layer, spec, Isa.AVX512VBMI))
    want = kernel.linear(x, packed, spec, bias, Isa.AVX512VBMI, -1)
    found = kernel.linear(x, packed, spec, bias, Isa.AMX, threads)
    dtype = BITS[x.element_size()]
    assert torch.equal(found.view(dtype), want.view(dtype)), (spec, x.shape, x.dtype, threads)
    return found


def draw_x(tokens: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, width, generator=generator) * torch.logspace(-3, 2, tokens)[:, None]).to(
        dtype
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_layers(make_layer, cases, seed: int) -> None:
    rng = random.Random(seed)
    for number, (spec, _, threads) in enumerate(cases(200 + seed, 20)):
        tokens = rng.choice([MANY, 15, 16, 17, 24, 25, 31, 32, 33, rng.randint(MANY, 150)])
        dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
        layer = make_layer(spec, number)
        bias = None if number % 2 else torch.randn(spec.out_features).to(dtype)
        assert_same_bits(draw_x(tokens, spec.in_features, dtype, number), layer, spec, bias, threads)


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(70, 4096, 1, 64, 64, rank=16),
        LayerSpec(40, 16384, 1, 128, 128, rank=3, bits=8),
        LayerSpec(33, 8 * 1536, 8, 32, 48, rank=17),
        LayerSpec(64, 37 * 96, 1, 37, 96),
        LayerSpec(64, 5 * 32, 5, 1, 32, rank=1),
    ],
)
@pytest.mark.parametrize("tokens", [20, 100, 330])
def test_wide_layers_in_several_chunks_and_batches(make_layer, spec: LayerSpec, tokens: int) -> None:
    layer, x = make_layer(spec, 1), draw_x(tokens, spec.in_features, torch.bfloat16, 2)
    for threads in (-1, -3):
        assert_same_bits(x, layer, spec, threads=threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e-20, 1e20, 1e36])
def test_extreme_inputs(make_layer, dtype: torch.dtype, factor: float) -> None:
    """Scales at both ends of the exponent, where quotients are computed by division, and rows that are not finite."""
    spec = LayerSpec(50, 192, 2, 8, 12, rank=3)
    x = draw_x(40, spec.in_features, torch.float32, 3) * factor
    x[5], x[9, 7], x[20, 100], x[21, 3] = 0, float("nan"), float("inf"), -float("inf")
    assert_same_bits(x.to(dtype), make_layer(spec, 4), spec)


def test_subnormal_outputs(make_layer) -> None:
    """The instruction that rounds to bfloat16 would flush them to zero."""
    spec = LayerSpec(64, 64, 1, 8, 8)
    layer = make_layer(spec, 5)
    layer["weight_scale"] = torch.full_like(layer["weight_scale"], 1e-38)
    y = assert_same_bits(draw_x(32, 64, torch.bfloat16, 6), layer, spec)
    assert ((y != 0) & (y.abs() < torch.finfo(torch.bfloat16).tiny)).any()


def test_a_row_alone_and_among_many(make_layer) -> None:
    """A row gets the same output by table lookup, alone, as with AMX, in a prompt."""
    spec = LayerSpec(96, 576, 1, 24, 24, rank=4)
    x, packed = draw_x(75, 576, torch.bfloat16, 7), kernel.pack(make_layer(spec, 8), spec, Isa.AMX)
    whole = kernel.linear(x, packed, spec, isa=Isa.AMX)
    for start, count in ((0, 1), (7, 3), (30, MANY - 1), (40, 17), (70, 5)):
        part = slice(start, start + count)
        assert torch.equal(kernel.linear(x[part], packed, spec, isa=Isa.AMX), whole[part])


def test_all_variants_with_fused_multiply_add_agree(
    variants: list[Isa], make_layer, make_codes, cases
) -> None:
    """From the same codes, scales and u; the scalar variant rounds its products."""
    generator = torch.Generator().manual_seed(9)
    for number, (spec, _, _) in enumerate(cases(9, 10)):
        layer, q = make_layer(spec, number), make_codes(spec, 40, generator)
        scale = torch.rand(40, spec.rotation_groups, generator=generator)
        u = torch.randn(40, spec.rank, generator=generator)
        outputs = [
            kernel.binary_matmul(q, scale, u, kernel.pack(layer, spec, isa), spec, isa=isa)
            for isa in variants
            if isa is not Isa.SCALAR
        ]
        assert all(torch.equal(output, outputs[0]) for output in outputs), spec


def test_torch_computes_the_same_before_and_after(make_layer) -> None:
    """oneDNN uses the same tile registers in the same thread."""
    spec = LayerSpec(64, 256, 1, 16, 16)
    layer, x = make_layer(spec, 10), draw_x(64, 256, torch.bfloat16, 11)
    packed = kernel.pack(layer, spec, Isa.AMX)
    codes = torch.randint(-127, 128, (64, 256), dtype=torch.int8)
    exact, product = codes.long() @ codes.long().t(), x @ x.t()
    for _ in range(3):
        kernel.linear(x, packed, spec, isa=Isa.AMX)
        assert torch.equal(torch._int_mm(codes, codes.t().contiguous()).long(), exact)
        assert torch.equal(x @ x.t(), product)
