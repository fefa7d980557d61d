"""Properties of the reference implementation itself."""

from dataclasses import replace

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec, unpack_signs
from hypothesis import given, settings
from hypothesis import strategies as st

SPECS = [
    LayerSpec(48, 64, 1, 8, 8),
    LayerSpec(33, 192, 2, 8, 12, rank=3, bias=True),
    LayerSpec(7, 512, 8, 8, 8, rank=1, bits=4, clip=0.9),
    LayerSpec(20, 352, 1, 16, 22, bits=16, rank=2),
    LayerSpec(21, 192, 2, 8, 12, rank=2, bias=True, planes=3),
    LayerSpec(9, 64, 1, 8, 8, bits=16, planes=4),
]
GROUPED_SPECS = [
    LayerSpec(40, 512, 4, 1, 128, bits=8, grouped=True),
    LayerSpec(70, 192, 2, 1, 96, bias=True, planes=2, grouped=True),
    LayerSpec(20, 96, 3, 1, 32, bits=16, planes=2, grouped=True),
]


def ids(spec: LayerSpec) -> str:
    return f"{spec.out_features}x{spec.in_features}g{spec.rotation_groups}r{spec.rank}b{spec.bits}"


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_rotating_input_and_weight_leaves_the_product_unchanged(spec: LayerSpec, make_layer) -> None:
    layer = make_layer(spec, 1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, spec.in_features, generator=generator, dtype=torch.float64)
    w = torch.randn(spec.out_features, spec.in_features, generator=generator, dtype=torch.float64)
    sides = [torch.linalg.qr(layer[key].double()).Q for key in ("rotation_left", "rotation_right")]  # exact
    product = reference.rotate(x, *sides) @ reference.rotate(w, *sides).t()
    torch.testing.assert_close(product, x @ w.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        reference.rotate_back(reference.rotate(x, *sides), *sides), x, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_planes_add_up(planes: int, make_layer) -> None:
    spec = LayerSpec(21, 192, 2, 8, 12, planes=planes)
    layer, x = make_layer(spec, 3), torch.randn(5, 192, generator=torch.Generator().manual_seed(4))
    one = replace(spec, planes=1)
    parts = [
        {**layer, "weight_packed": layer["weight_packed"][:, p], "weight_scale": layer["weight_scale"][:, p]}
        for p in range(planes)
    ]
    y = sum(reference.linear(x, part, one) for part in parts)
    torch.testing.assert_close(reference.linear(x, layer, spec), y, rtol=1e-5, atol=1e-5)
    weight = sum(reference.dequantize(part, one) for part in parts)
    torch.testing.assert_close(reference.dequantize(layer, spec), weight, rtol=1e-5, atol=1e-5)


def test_rotation_is_l_transposed_x_r_row_major() -> None:
    left, right = torch.linalg.qr(torch.randn(3, 4, 4))[0], torch.linalg.qr(torch.randn(3, 8, 8))[0]
    x = torch.randn(2, 96)
    cells = x.view(2, 3, 4, 8)
    by_hand = torch.stack(
        [torch.cat([(left[g].t() @ row[g] @ right[g]).flatten() for g in range(3)]) for row in cells]
    )
    torch.testing.assert_close(reference.rotate(x, left, right), by_hand)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_round_half_to_even_and_span_the_range(bits: int) -> None:
    q_max = 2 ** (bits - 1) - 1
    # The largest magnitude is q_max itself, so the scale is 1 and the codes are the rounded values.
    halves = torch.arange(-q_max, q_max, dtype=torch.float32) + 0.5
    x_hat = torch.cat([halves, torch.tensor([float(q_max), -float(q_max)])]).unsqueeze(0)
    codes, scale = reference.quantize(x_hat, 1, bits, 1.0)
    assert scale.item() == 1.0
    assert torch.equal(codes[0].float(), torch.round(x_hat[0]))
    assert codes.max() == q_max
    assert codes.min() == -q_max


def test_half_values_go_to_the_even_neighbour() -> None:
    codes, _ = reference.quantize(torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 31.0, 0.0]]), 1, 6, 1.0)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 31, 0]]


def test_clip_saturates_what_lies_beyond_it() -> None:
    codes, scale = reference.quantize(torch.tensor([[10.0, 5.0, -10.0, 1.0]]), 1, 6, 0.5)
    assert scale.item() == pytest.approx(5 / 31)
    assert codes.tolist() == [[31, 31, -31, 6]]


def test_blocks_have_their_own_scale_and_zero_blocks_are_zero() -> None:
    x_hat = torch.zeros(2, 96)
    x_hat[0, :32], x_hat[0, 64:] = 1.0, 4.0
    codes, scale = reference.quantize(x_hat, 3, 6, 1.0)
    torch.testing.assert_close(scale, torch.tensor([[1 / 31, 0.0, 4 / 31], [0.0, 0.0, 0.0]]))
    assert codes[0, :32].eq(31).all()
    assert codes[0, 64:].eq(31).all()
    assert codes[0, 32:64].eq(0).all()
    assert codes[1].eq(0).all()


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 8), blocks=st.sampled_from([1, 2, 4]), seed=st.integers(0, 2**31))
def test_quantization_error_is_at_most_half_a_step(bits: int, blocks: int, seed: int) -> None:
    x_hat = torch.randn(3, 128, generator=torch.Generator().manual_seed(seed))
    codes, scale = reference.quantize(x_hat, blocks, bits, 1.0)
    error = (codes.view(3, blocks, -1) * scale.unsqueeze(-1) - x_hat.view(3, blocks, -1)).abs()
    assert (error <= scale.unsqueeze(-1) * 0.5 * (1 + 1e-5)).all()


def test_block_sums_are_exact_integers_at_the_widest() -> None:
    q = torch.full((1, 65536), 127, dtype=torch.int8)
    signs = torch.ones(2, 65536, dtype=torch.int8)
    signs[1, 0] = -1
    assert reference.group_sums(q, signs, 1)[0, 0].tolist() == [127 * 65536, 127 * 65534]


@pytest.mark.parametrize("spec", SPECS + GROUPED_SPECS, ids=ids)
def test_linear_follows_the_formula(spec: LayerSpec, make_layer) -> None:
    layer = make_layer(spec, 3)
    x = torch.randn(4, spec.in_features, generator=torch.Generator().manual_seed(4))
    prepared = reference.prepare_input(x, layer, spec)
    signs = unpack_signs(layer["weight_packed"], torch.float64).view(spec.out_features, spec.planes, -1)
    alpha = layer["weight_scale"].double().view(spec.out_features, spec.planes, -1)
    alpha = alpha.expand(-1, -1, spec.rotation_groups)
    width = spec.group_width
    y = torch.zeros(4, spec.out_features, dtype=torch.float64)
    for g in range(spec.rotation_groups):
        part = slice(g * width, (g + 1) * width)
        for p in range(spec.planes):
            dots = prepared.q[:, part].double() @ signs[:, p, part].t()
            y += alpha[:, p, g] * prepared.scale[:, g : g + 1].double() * dots
    if spec.rank:
        y += x.double() @ layer["low_rank_a"].double().t() @ layer["low_rank_b"].double().t()
    if spec.bias:
        y += layer["bias"].double()
    torch.testing.assert_close(reference.linear(x, layer, spec).double(), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS + GROUPED_SPECS, ids=ids)
def test_unquantized_activations_equal_the_dequantized_weight(spec: LayerSpec, make_layer) -> None:
    wide = LayerSpec(**{**spec.__dict__, "bits": 16})
    layer = make_layer(wide, 5)
    x = torch.randn(6, spec.in_features, generator=torch.Generator().manual_seed(6))
    expected = x @ reference.dequantize(layer, wide).t()
    if spec.bias:
        expected = expected + layer["bias"]
    torch.testing.assert_close(reference.linear(x, layer, wide), expected, rtol=1e-3, atol=1e-3)


def test_more_bits_come_closer(make_layer) -> None:
    errors = []
    for bits in (2, 4, 6, 8):
        spec = LayerSpec(40, 256, 2, 8, 16, bits=bits)
        layer = make_layer(spec, 7)
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(8))
        exact = x @ reference.dequantize(layer, spec).t()
        errors.append((reference.linear(x, layer, spec) - exact).norm().item())
    assert errors == sorted(errors, reverse=True)


def test_leading_axes_and_zero_tokens(make_layer) -> None:
    spec = LayerSpec(5, 64, 1, 8, 8)
    layer = make_layer(spec, 9)
    assert reference.linear(torch.zeros(2, 3, 64), layer, spec).eq(0).all()
    assert reference.linear(torch.zeros(0, 64), layer, spec).shape == (0, 5)
