"""The clip that is chosen is the best of those tried, by the layer's own arithmetic."""

import pytest
import torch
from bwla_converter.quantize.activation_clip import CLIPS, choose_clip, output_error
from bwla_kernels.format import LayerSpec


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_clip_is_better(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x_hat, weight = torch.randn(300, 64, generator=generator), torch.randn(12, 64, generator=generator)
    spec = LayerSpec(12, 64, 2, 4, 8, bits=bits)
    best = choose_clip(x_hat, weight, spec)
    errors = {
        clip: output_error(x_hat, weight, LayerSpec(12, 64, 2, 4, 8, bits=bits, clip=clip)) for clip in CLIPS
    }
    assert errors[best] == pytest.approx(min(errors.values()), rel=1e-6)


def test_few_levels_want_a_clip_and_one_large_value_a_smaller_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x_hat, weight = torch.randn(200, 64, generator=generator), torch.eye(64)
    spec = LayerSpec(64, 64, 1, 8, 8, bits=3)
    assert choose_clip(x_hat, weight, spec) < 1.0
    flat = x_hat.sign()  # every value is the largest: any clip would cut all of them
    assert choose_clip(flat, weight, spec) == 1.0


def test_nothing_to_choose() -> None:
    x_hat = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for bits in (6, 16):
        assert choose_clip(x_hat, torch.eye(64), LayerSpec(64, 64, 1, 8, 8, bits=bits)) == 1.0
    assert choose_clip(x_hat[:0], torch.eye(64), LayerSpec(64, 64, 1, 8, 8, bits=3)) == 1.0
