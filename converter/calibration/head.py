"""Quantize the head in binary planes for the calibration samples, once all decoder layers are quantized."""

from collections.abc import Mapping

from bwla_converter.calibration.loop import CalibrationLoop
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.head import quantize_head
from bwla_kernels.format import LayerSpec
from torch import Tensor


def head_of_samples(
    loop: CalibrationLoop,
    final_norm: Mapping[str, Tensor],
    weight: Tensor,
    spec: LayerSpec,
    seed: int,
    options: FastOptions,
) -> GroupResult:
    """Quantize the head for the inputs that the quantized layers and the fitted final norm give it.

    Args:
        loop: the calibration samples after the last layer.
        final_norm: the fitted weight of the final norm by its full name, if it was fitted.
        weight: the head's W [V, K].
        spec, seed, options: as in `quantize.head.quantize_head`.
    """
    moments, inputs = loop.collect_head_moments(final_norm)
    return quantize_head(
        weight.to(loop.store.device),
        spec,
        moments,
        inputs=inputs if options.choose_clip else None,
        seed=seed,
        options=options,
    )
