"""The metadata of a GGUF file that describe its model, read by keys without the architecture's prefix."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from bwla_converter.source.gguf_file import GGUFFile
from bwla_kernels.errors import SourceError

IGNORED = (
    "vocab_size",  # the embedding says it
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.causal",
    "rope.dimension_count_swa",
    "rope.scaling.type",
    "rope.scaling.finetuned",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",  # the experts' tensors say it, also in files that lack the key
    "expert_shared_feed_forward_length",
    "use_parallel_residual",  # there is a second norm in each layer, or none
    "tensor_data_layout",
    "nextn_predict_layers",
    "interleave_moe_layer_step",
)
"""Keys that are checked elsewhere, that the tensors answer as well, or that say nothing about the computation."""


class Keys:
    """The metadata of one architecture, without the prefix; keeps track of the keys that were read."""

    def __init__(self, file: GGUFFile) -> None:
        self._file, self._prefix = file, f"{file.architecture}."
        self._unread = {name for name in file.metadata if name.startswith(self._prefix)}

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, with floats as short as float32 allows: 1e-05 instead of 9.999999747378752e-06."""
        name = self._prefix + key
        self._unread.discard(name)
        value = self._file.metadata.get(name, default)
        return shorten(value)

    def need(self, key: str) -> Any:
        """Return the value of a key.

        Raises:
            SourceError: the file does not have it.
        """
        value = self.get(key)
        if value is None:
            raise self.missing(self._prefix + key)
        return value

    def missing(self, name: str) -> SourceError:
        """Return the error for a key that the file lacks; `name` is the key with its prefix."""
        return SourceError(
            f"{self._file.path}: expected {name} in its metadata, found none: the file is damaged or "
            "was written by an old converter, so get a newer one"
        )

    def unread(self) -> list[str]:
        """Return the keys that nobody has asked for."""
        return sorted(self._unread - {self._prefix + key for key in IGNORED})

    def whole(self, more: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return all metadata under their full names, with `more`, as a mapping that notes which of them are read."""
        return _Noted(self, {**self._file.metadata, **more}, self._prefix)


class _Noted(dict[str, Any]):
    """Metadata under their full names; each access is noted in `Keys`."""

    def __init__(self, keys: Keys, metadata: Mapping[str, Any], prefix: str) -> None:
        super().__init__({name: shorten(value) for name, value in metadata.items()})
        self._keys, self._prefix = keys, prefix

    def __getitem__(self, name: str) -> Any:
        self._keys.get(name.removeprefix(self._prefix))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self._keys.get(name.removeprefix(self._prefix))
        return super().get(name, default)


def shorten(value: Any) -> Any:
    """Return a float with as few digits as float32 needs; anything else unchanged."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def read_floats(file: GGUFFile, name: str) -> list[float]:
    """Return the values of a small tensor.

    Raises:
        SourceError: it is missing, or not float32.
    """
    tensor = file.tensors.get(name)
    if tensor is None or tensor.data.dtype != np.float32:
        raise SourceError(f"{file.path}: expected {name} in float32, found none: get the file again")
    return [float(str(value)) for value in tensor.data.ravel()]


def layers_of(file: GGUFFile, tensor: str, layers: int) -> Iterator[int]:
    """Yield the decoder layers that have a tensor, such as "attn_v.weight"."""
    return (index for index in range(layers) if f"blk.{index}.{tensor}" in file.tensors)
