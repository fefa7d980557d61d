"""The chosen clip is the best of the candidates, by the reference implementation's output error."""

from dataclasses import replace

import pytest
import torch
from bwla_converter.quantize.activation_clip import CLIPS, choose_clip
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec, unpack_signs
from bwla_kernels.format.layer import UNQUANTIZED_BITS
from random_tensors import normal, random_layer
from torch import Tensor


def output_error(x: Tensor, tensors: dict[str, Tensor], spec: LayerSpec) -> float:
    """Return the reference implementation's squared output error that is due to the activations' quantization."""
    exact = reference.linear(x, tensors, replace(spec, bits=UNQUANTIZED_BITS, clip=1.0))
    return float((reference.linear(x, tensors, spec) - exact).double().square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_clip_is_better(bits: int) -> None:
    """Scored by whole layers, whose rotation and column scale give the x_hat that `choose_clip` sees."""
    spec = LayerSpec(12, 64, 2, 4, 8, bits=bits)
    tensors, x = random_layer(spec, seed=bits), normal(300, 64, seed=bits)
    x_hat = reference.rotate(x, tensors["rotation_left"], tensors["rotation_right"]) * tensors["column_scale"]
    weight = unpack_signs(tensors["weight_packed"], torch.float32) * tensors["weight_scale"].unsqueeze(1)
    errors = {clip: output_error(x, tensors, replace(spec, clip=clip)) for clip in CLIPS}
    assert len(set(errors.values())) == len(CLIPS)
    assert errors[choose_clip(x_hat, weight, spec)] == pytest.approx(min(errors.values()), rel=1e-6)


def test_few_levels_need_a_clip_unless_all_values_are_equally_large() -> None:
    generator = torch.Generator().manual_seed(0)
    x_hat, weight = torch.randn(200, 64, generator=generator), torch.eye(64)
    spec = LayerSpec(64, 64, 1, 8, 8, bits=3)
    assert choose_clip(x_hat, weight, spec) < 1.0
    flat = x_hat.sign()  # every value is the largest: any clip would saturate all of them
    assert choose_clip(flat, weight, spec) == 1.0


def test_without_inputs_or_with_many_bits_nothing_is_clipped() -> None:
    x_hat = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for bits in (6, 16):
        assert choose_clip(x_hat, torch.eye(64), LayerSpec(64, 64, 1, 8, 8, bits=bits)) == 1.0
    assert choose_clip(x_hat[:0], torch.eye(64), LayerSpec(64, 64, 1, 8, 8, bits=3)) == 1.0
