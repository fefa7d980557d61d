"""The table-lookup product is exact: every variant, over thousands of shapes, against integer arithmetic."""

import pytest
import torch
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.cpu.library import Isa
from bwla_kernels.format import LayerSpec, tensor_specs, to_storage_dtype, unpack_signs
from torch import Tensor


def bare_layer(spec: LayerSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """A layer with random signs; its input transform does not matter here."""
    n, k, r = spec.out_features, spec.in_features, spec.rank
    shapes = {name: want.shape for name, want in tensor_specs(spec).items()}
    words = torch.randint(-(2**31), 2**31, shapes["weight_packed"], generator=generator).to(torch.int32)
    tensors = {
        "weight_packed": words,
        "weight_scale": torch.ones(shapes["weight_scale"]),
        "rotation_left": torch.zeros(spec.rotation_groups, spec.n1, spec.n1),
        "rotation_right": torch.zeros(spec.rotation_groups, spec.n2, spec.n2),
        "column_scale": torch.ones(k),
        "low_rank_a": torch.zeros(r, k),
        "low_rank_b": torch.zeros(n, r),
    }
    return to_storage_dtype({name: tensors[name] for name in shapes}, spec)


def expected(q: Tensor, words: Tensor, spec: LayerSpec) -> Tensor:
    """[M, G, N] or [M, G, P, N]; float32 holds these integers exactly: 127 * 65,536 < 2^24."""
    width, cells, signs = spec.group_width, q.float(), unpack_signs(words, torch.float32)
    parts = [slice(start, start + width) for start in range(0, spec.in_features, width)]
    planes = signs.view(spec.out_features, spec.planes, -1).unbind(1)
    sums = [torch.stack([cells[:, part] @ plane[:, part].t() for plane in planes], 1) for part in parts]
    return (
        torch.stack(sums, 1).to(torch.int32).view(len(q), len(parts), *words.shape[1:-1], spec.out_features)
    )


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(variants: list[Isa], cases, make_codes, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for spec, tokens, threads in cases(seed, 100):
        layer, q = bare_layer(spec, generator), make_codes(spec, tokens, generator)
        want = expected(q, layer["weight_packed"], spec)
        for isa in variants:
            sums = kernel.dot_products(q, kernel.pack(layer, spec, isa), spec, isa, threads)
            assert torch.equal(sums, want), (isa, spec, tokens, threads)


@pytest.mark.parametrize("bits", [2, 6, 7, 8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_do_not_overflow(isa: Isa, bits: int, sign: int) -> None:
    """All codes at the limit, all signs alike, wide enough for every narrow intermediate sum to fill up."""
    spec = LayerSpec(70, 32 * 600, 2, 75, 128, bits=bits)
    layer = bare_layer(spec, torch.Generator())
    layer["weight_packed"] = torch.full_like(layer["weight_packed"], -1 if sign > 0 else 0)
    q = torch.full((3, spec.in_features), spec.q_max, dtype=torch.int8)
    sums = kernel.dot_products(q, kernel.pack(layer, spec, isa), spec, isa)
    assert (sums == sign * spec.q_max * spec.group_width).all()


def test_many_tokens_take_several_batches(isa: Isa, make_codes) -> None:
    """The tables of 150 tokens of 16,384 columns and two digits exceed what is built at a time."""
    spec, generator = LayerSpec(130, 16384, 1, 128, 128, bits=8), torch.Generator().manual_seed(1)
    layer, q = bare_layer(spec, generator), make_codes(spec, 150, generator)
    packed, want = kernel.pack(layer, spec, isa), expected(q, layer["weight_packed"], spec)
    for threads in (-1, -3):
        assert torch.equal(kernel.dot_products(q, packed, spec, isa, threads), want)


def test_no_tokens(isa: Isa) -> None:
    spec = LayerSpec(10, 64, 1, 8, 8)
    packed = kernel.pack(bare_layer(spec, torch.Generator()), spec, isa)
    assert kernel.dot_products(torch.zeros(0, 64, dtype=torch.int8), packed, spec, isa).shape == (0, 1, 10)
