"""Keep measured sensitivities in the cache, so that trying several sizes of a model measures them once."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from bwla_converter.source.folder.cached import cached_file, digest_of_tokens
from bwla_kernels.format import LayerSpec
from torch import Tensor

Numbers = dict[str, tuple[float, float]]
"""First linear of each input group -> its `Sensitivity.weights` and `Sensitivity.inputs`."""


def sensitivities_file(
    folder: Path, specs: Mapping[str, LayerSpec], ids: Tensor, seed: int, device: str
) -> Path:
    """Return the file in the cache, under a digest of everything that determines its contents.

    Args:
        folder: folder of the model.
        specs: spec of every linear to quantize.
        ids: token ids of the samples that are measured on [S, T].
        seed: seed of the conversion.
        device: type of the device that computes.
    """
    rotations = {name: (spec.rotation_groups, spec.n1, spec.n2) for name, spec in specs.items()}
    parts = (rotations, digest_of_tokens(ids), seed, device, version("bwla"))
    return cached_file("sensitivities", ".json", folder, *parts)
