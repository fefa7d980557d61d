"""GGUF files, the format of llama.cpp: read the header, check it, and dequantize tensors to bfloat16.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the package `gguf` of the same
project parses the header and dequantizes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bwla_converter.source.gguf_path import MAGIC, SUFFIX
from bwla_converter.source.gguf_types import dequantize
from bwla_kernels.errors import SourceError
from gguf import GGUFEndian, GGUFReader, ReaderTensor
from torch import Tensor

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""Names that llama.cpp gives to the parts of a split model, which count from 1."""

VOCABULARY = re.compile(r"tokenizer\.ggml\.(tokens|merges|scores|token_type)")
"""Long lists in the metadata, which only the tokenizer needs."""

CHUNK = 2**22
"""Number of values that are dequantized at once, so that memory beyond the result stays at some tens of MB."""

NOT_MODELS = {
    "adapter": "an adapter (LoRA), not a model: merge it into its base model first",
    "mmproj": "the vision or audio encoder of a multimodal model, not the language model: give the other file",
    "imatrix": "an importance matrix, not a model: give the model's file",
    "vocab": "a vocabulary without weights: give the model's file",
}
"""Values of `general.type` that are no language model, and what is said about them."""


@dataclass(frozen=True)
class GGUFFile:
    """The header of a model in one GGUF file, or in several parts.

    Attributes:
        path: the file, the first one of a split model.
        metadata: the key-value pairs of the header, without the vocabulary.
        tensors: the tensors by name; their data is mapped, not read.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, ReaderTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, like "llama"."""
        return str(self.metadata.get("general.architecture"))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in torch's order: the dimension that is contiguous in memory is the last."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(
        self,
        name: str,
        part: tuple[int, int] = (0, 1),
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Dequantize one tensor and round it to `dtype`.

        Args:
            name: name of the tensor.
            part: number of the part to read, and the number of parts into which the tensor's rows are divided.
            dtype: dtype of the result.

        Returns: the tensor in its shape, or a part of its rows [N / parts, K].
        """
        tensor, (index, count) = self.tensors[name], part
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        size = len(rows) // count
        result = torch.empty(size, tensor.n_elements // len(rows), dtype=dtype)
        step = max(1, CHUNK // result.shape[1])
        for start in range(0, size, step):
            stop = min(start + step, size)
            # A copy, because torch cannot use the mapped file, which is read-only.
            values = dequantize(
                np.array(rows[index * size + start : index * size + stop]), tensor.tensor_type
            )
            result[start:stop] = torch.from_numpy(values)
        return result.view(self.shape(name)) if count == 1 else result


def part_paths(path: Path) -> list[Path]:
    """Return the files of a model by the name of its first one: all parts of a split model, else the file itself.

    Raises:
        SourceError: a file is missing, or `path` is not the first part.
    """
    match = PART.fullmatch(path.name)
    paths = [path]
    if match is not None:
        stem, number, count = match[1], int(match[2]), int(match[3])
        paths = [path.with_name(f"{stem}-{i:05}-of-{count:05}{SUFFIX}") for i in range(1, count + 1)]
        if number != 1:
            raise SourceError(
                f"{path}: is part {number} of a split model: give the first part, {paths[0].name}"
            )
    for part in paths:
        if not part.is_file():
            raise SourceError(f"{part}: there is no such file: check the path, or download it")
    return paths


def open_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file and of its further parts.

    Raises:
        SourceError: a file is missing, damaged, not a language model, or has tensors that cannot be dequantized.
    """
    metadata: dict[str, Any] = {}
    tensors: dict[str, ReaderTensor] = {}
    paths = part_paths(path)
    for number, part in enumerate(paths):
        reader = _open(part)
        found = _metadata(reader)
        metadata = metadata or found
        if found.get("split.no", 0) != number or found.get("split.count", 1) not in (0, len(paths)):
            raise SourceError(
                f"{part}: is part {found.get('split.no', 0) + 1} of {found.get('split.count', 1)} by its metadata, but "
                f"part {number + 1} of {len(paths)} by its name: keep the names that the parts had when downloaded"
            )
        tensors.update({tensor.name: tensor for tensor in reader.tensors})
    file = GGUFFile(path, metadata, tensors)
    _check_kind(file)
    expected = metadata.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise SourceError(
            f"{path}: expected {expected} tensors in all parts, found {len(tensors)}: download the parts again"
        )
    _check_types(file)
    return file


def _open(path: Path) -> GGUFReader:
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] != MAGIC:
        raise SourceError(f"{path}: expected a GGUF file, found other contents: download it again")
    if int.from_bytes(start[4:8], "little") & 0xFFFF == 0:
        raise SourceError(
            f"{path}: is a big-endian GGUF file, of which only the header can be read: get the little-endian one"
        )
    try:
        reader = GGUFReader(path)
    # gguf raises what numpy and Python raise for slices beyond the end of the file and for unknown numbers.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, TypeError) as cause:
        reason = re.sub(r"np\.\w+\((\d+)\)", r"\1", " ".join(str(cause).split()))
        raise SourceError(
            f"{path}: gguf {version('gguf')} cannot read this file ({reason:.200}): it is incomplete, so download it "
            "again, or it needs a newer gguf"
        ) from None
    assert reader.endianess == GGUFEndian.LITTLE
    return reader


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    try:
        return {
            name: field.contents() for name, field in reader.fields.items() if not VOCABULARY.fullmatch(name)
        }
    except UnicodeDecodeError:
        path = reader.data.filename
        raise SourceError(f"{path}: its metadata is not valid UTF-8: download it again") from None


def _check_kind(file: GGUFFile) -> None:
    """Raise unless the file holds a language model."""
    kind = str(file.metadata.get("general.type", "model"))
    if file.architecture == "clip":
        kind = "mmproj"
    if kind in NOT_MODELS:
        raise SourceError(f"{file.path}: is {NOT_MODELS[kind]}")
    if not file.tensors:
        raise SourceError(f"{file.path}: is {NOT_MODELS['vocab']}")
    if "general.architecture" not in file.metadata:
        raise SourceError(
            f"{file.path}: expected general.architecture in its metadata, found none: get another file"
        )


def _check_types(file: GGUFFile) -> None:
    """Raise if there are tensors that cannot be dequantized; tried on a row of the first tensor of each type."""
    tried: dict[Any, str] = {}
    for name, tensor in file.tensors.items():
        if tensor.tensor_type in tried:
            continue
        tried[tensor.tensor_type] = name
        row = np.array(tensor.data.reshape(-1, tensor.data.shape[-1])[:1])
        try:
            dequantize(row, tensor.tensor_type)
        except NotImplementedError:
            raise SourceError(
                f"{file.path}: {name} has type {tensor.tensor_type.name}, which gguf {version('gguf')} cannot "
                "dequantize: use a newer gguf, or get the model in another type such as Q8_0 or BF16"
            ) from None
