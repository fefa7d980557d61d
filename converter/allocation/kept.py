"""Keep measured sensitivities in the cache, so that trying several sizes of a model measures them once."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from bwla_converter.allocation.sensitivity import Sensitivity
from bwla_converter.common.atomic_files import whole_file
from bwla_converter.common.write_errors import WriteError
from bwla_converter.source.folder.cached import cached_file
from bwla_kernels.format import LayerSpec
from pydantic import TypeAdapter
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
    samples = hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
    parts = (rotations, samples, list(ids.shape), seed, device, version("bwla"))
    return cached_file("sensitivities", ".json", folder, *parts)


def kept_or_measured(file: Path, measure: Callable[[], Mapping[str, Sensitivity]]) -> Numbers:
    """Return the sensitivities that `file` holds; if there is no such file, measure them and write it.

    A file that cannot be written or read is not an error: the sensitivities are measured again.
    """
    with suppress(OSError, ValueError):
        return TypeAdapter(Numbers).validate_json(file.read_bytes())
    found = {name: (measured.weights, measured.inputs) for name, measured in measure().items()}
    with suppress(OSError, WriteError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as part:
            part.write_text(json.dumps(found))
    return found
