"""The names of tensors in the files and in the modules that transformers builds."""

from collections.abc import Mapping

from bwla_converter.source.model import Source
from torch import Tensor


def stored_name(source: Source, name: str) -> str:
    """Return the stored name of a module or tensor outside the decoder layers, given its path in the model."""
    return name


def block_state(source: Source, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of decoder layer `index`.

    Args:
        source: the model.
        index: number of the layer.
        tensors: tensors of the layer by their stored names.
    """
    prefix = source.structure.layer_name(index) + "."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")  # computed, but stored in some old files
    }
