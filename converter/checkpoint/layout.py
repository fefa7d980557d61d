"""The output of a conversion: which files it has, what its config and report say, and that it can be read back."""

import shutil
from pathlib import Path
from typing import Any

from bwla_converter.checkpoint.writer import OutputError
from bwla_converter.common.tensors import entry_bytes
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.source.model import Source
from bwla_kernels.format import tensor_specs, validate_layer
from bwla_kernels.format.folder import check_folder, read_folder, read_tensors
from bwla_kernels.format.head import HEAD_MODULE, HeadSpec, head_tensor_specs, validate_head
from bwla_kernels.head import quantize_head
from torch import Tensor

SHARD_BYTES = 4 * 2**30
"""Wished size of the shards that hold what is not quantized."""


def verify(folder: Path) -> None:
    """Read a finished checkpoint back and check every quantized layer's tensors.

    Raises:
        FormatError: what is wrong, naming file and tensor.
    """
    entries = read_folder(folder)
    for name, spec in check_folder(folder, entries).items():
        stored = read_tensors(folder, entries, [f"{name}.{key}" for key in tensor_specs(spec)])
        validate_layer(name, {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items()}, spec)
    codes = entries.get(f"{HEAD_MODULE}.weight_int8")
    if codes is not None:
        head = HeadSpec(*codes.shape)
        stored = read_tensors(folder, entries, [f"{HEAD_MODULE}.{key}" for key in head_tensor_specs(head)])
        validate_head({key.removeprefix(f"{HEAD_MODULE}."): tensor for key, tensor in stored.items()}, head)


def quantized_head(weight: Tensor) -> dict[str, Tensor]:
    """The 8-bit head made from a head's or an embedding's weight, under its stored names."""
    return {f"{HEAD_MODULE}.{key}": value for key, value in quantize_head(weight).items()}


def output_config(source: Source, plan: ConversionPlan) -> dict[str, Any]:
    """config.json of the output: an 8-bit head is a tensor of its own, tied to nothing."""
    untied = {"tie_word_embeddings": False} if plan.head_source else {}
    return {**source.config, **untied, "quantization_config": plan.format.to_json()}


def check_space(out: Path, needed: int) -> None:
    """Refuse an output that the disk has no room for.

    Raises:
        OutputError: less free space than `needed` bytes and 2 % for headers.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    if needed * 1.02 > free:
        raise OutputError(
            f"{out}: expected {needed / 1e9:.2f} GB of free disk space, found {free / 1e9:.2f} GB: free some space"
        )


class Shards:
    """Names of the output's files: one a block, then what is outside the blocks in files of about 4 GiB."""

    def __init__(self, source: Source) -> None:
        self._blocks = source.num_layers
        self._rest: list[list[str]] = []
        size = SHARD_BYTES
        for name in source.names_outside_layers():
            bytes_ = entry_bytes(source.entries[name])
            if size + bytes_ > SHARD_BYTES:
                self._rest.append([])
                size = 0
            self._rest[-1].append(name)
            size += bytes_

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._blocks + len(self._rest):05d}.safetensors"

    def layer_file(self, index: int) -> str:
        """File of decoder block `index`."""
        return self._file(index)

    def rest(self) -> list[tuple[str, list[str]]]:
        """Files of what is outside the blocks, with the source's tensor names."""
        return [(self._file(self._blocks + number), names) for number, names in enumerate(self._rest)]
