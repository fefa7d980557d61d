"""Choose an input group's activation clip: the quantization range as a fraction of a rotation group's absmax.

A smaller clip quantizes most values more finely and saturates the largest. The best clip of a grid is chosen by the
output error on calibration inputs. Above MAX_CLIPPED_BITS the steps are fine enough without clipping, and saturation,
unlike rounding, is a bias that adds up over the layers. There the clip stays 1 (measured at 6 bits: chosen clips
increase the perplexity loss by a sixth).
"""

from collections.abc import Sequence
from dataclasses import replace

from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import quantize
from torch import Tensor

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
MAX_CLIPPED_BITS = 4
CHUNK_ROWS = 256


def choose_clip(x_hat: Tensor, weight: Tensor, spec: LayerSpec, clips: Sequence[float] = CLIPS) -> float:
    """Return the clip with the smallest output error ||(x' - x_hat) W^T||, the largest one of equals.

    Args:
        x_hat: rotated and column-scaled inputs, float32 [M, K].
        weight: the dequantized binary weight in that basis, float32 [N, K].
        spec: a spec of the group; its clip is ignored.
        clips: candidates in decreasing order.
    """
    if spec.bits > MAX_CLIPPED_BITS or not len(x_hat):
        return 1.0
    errors = [
        sum(output_error(part, weight, replace(spec, clip=clip)) for part in x_hat.split(CHUNK_ROWS))
        for clip in clips
    ]
    return clips[errors.index(min(errors))]


def output_error(x_hat: Tensor, weight: Tensor, spec: LayerSpec) -> float:
    """Return ||(x' - x_hat) W^T||^2, where x' is x_hat quantized and dequantized."""
    codes, scale = quantize(x_hat, spec.rotation_groups, spec.bits, spec.clip)
    dequantized = (codes.unflatten(1, (spec.rotation_groups, -1)) * scale.unsqueeze(-1)).flatten(1)
    return float(((dequantized - x_hat) @ weight.mT).double().square().sum())
