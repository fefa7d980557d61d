"""A packed layer can be unpacked again, in every variant's layout, and gives the gradient of the dequantized layer."""

import pytest
import torch
from bwla_kernels import gradients, reference
from bwla_kernels.cpu.gradient import input_gradient, unpack_input_transform, unpack_low_rank_b
from bwla_kernels.cpu.library import Isa
from bwla_kernels.cpu.linear import pack, unpack_rows
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import to_compute_dtype


@pytest.mark.parametrize("seed", range(3))
def test_unpacking_undoes_packing(isa: Isa, cases, make_layer, seed: int) -> None:
    for spec, _, _ in cases(seed, 12):
        layer = make_layer(spec, seed)
        packed = pack(layer, spec, isa)
        signs, scales = reference.planes(layer, spec)
        cells = signs.float().unflatten(-1, (spec.scales_per_row, -1))
        expected = (cells * scales.float().unsqueeze(-1)).sum(1).flatten(1)
        weight = unpack_rows(packed, spec, slice(0, spec.out_features), isa)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        last = (spec.out_features - 1) // 64 * 64
        assert torch.equal(unpack_rows(packed, spec, slice(last, spec.out_features), isa), weight[last:])
        if spec.grouped:
            continue
        transform = unpack_input_transform(packed, spec)
        stored = to_compute_dtype(layer)
        assert transform.keys() == {key for key in layer if key in transform}
        assert all(torch.equal(tensor, stored[key]) for key, tensor in transform.items())
        if spec.rank:
            assert torch.equal(unpack_low_rank_b(packed, spec), layer["low_rank_b"])


def test_the_gradient_in_every_layout(isa: Isa, cases, make_layer, monkeypatch) -> None:
    monkeypatch.setattr(gradients, "WEIGHTS_AT_ONCE", 64 * 256)
    for spec, tokens, _ in cases(7, 12):
        layer = make_layer(spec, 7)
        gradient = torch.randn(tokens, spec.out_features, generator=torch.Generator().manual_seed(8))
        found = input_gradient(gradient, pack(layer, spec, isa), spec, isa)
        expected = gradient @ reference.dequantize(layer, spec)
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_packed_layer_of_another_size_is_refused(make_layer) -> None:
    spec = LayerSpec(70, 64, 1, 8, 8)
    packed = pack(make_layer(spec, 1), spec)
    with pytest.raises(BackendError, match="packed: expected contiguous"):
        unpack_rows(packed[:-64], spec, slice(0, 70))
    with pytest.raises(BackendError, match="refused .* its sizes are invalid"):
        unpack_rows(packed, spec, slice(64, 200))
