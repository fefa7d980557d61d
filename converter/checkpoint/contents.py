"""The contents of a BWLA checkpoint, from its config and headers alone: linears, and bits and bytes by purpose."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from bwla_converter.common.bits import describe_planes, num_weights, stored_bits, tensor_bits
from bwla_converter.common.tensors import entry_bytes
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import stored_specs
from bwla_kernels.format.folder import Entry, check_folder, read_folder, read_json
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE
from bwla_kernels.format.schema import BWLAFormat, parse_config

PARTS = {
    "weight_packed": "signs",
    "weight_scale": "row scales",
    "rotation_left": "rotations",
    "rotation_right": "rotations",
    "column_scale": "column scales",
    "low_rank_a": "low-rank",
    "low_rank_b": "low-rank",
}
"""Purpose of each stored tensor of a quantized linear; biases count as the rest of the model."""

LINEARS, HEAD, EMBEDDINGS, REST = "quantized linears", "head", "embeddings", "norms and other"


@dataclass(frozen=True)
class Contents:
    """Contents of a checkpoint.

    Attributes:
        folder: its folder.
        format: its `quantization_config`.
        specs: spec of every quantized linear of the decoder layers, by module path, in their order.
        entries: header of every stored tensor.
        bits: bits per quantized weight, everything counted, by purpose.
        bytes: bytes of the tensors, by part of the model.
        head_spec: spec of a head in binary planes, or None.
    """

    folder: Path
    format: BWLAFormat
    specs: Mapping[str, LayerSpec]
    entries: Mapping[str, Entry]
    bits: Mapping[str, float]
    bytes: Mapping[str, int]
    head_spec: LayerSpec | None = None

    @cached_property
    def all_specs(self) -> dict[str, LayerSpec]:
        """`specs`, and that of a head in binary planes."""
        return {**self.specs, **({} if self.head_spec is None else {HEAD_MODULE: self.head_spec})}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, everything counted."""
        return sum(self.bits.values())

    @property
    def embedding_bits(self) -> int:
        """Bits of the embedding: 8, or 16 where it is not quantized."""
        return 8 if self.format.embedding is not None else 16

    @property
    def head_bits(self) -> int:
        """Bits of the head, a head that is tied to the embedding included: its binary planes, 8, or 16."""
        if self.head_spec is not None:
            return self.head_spec.planes
        tied = not any(name.startswith(f"{HEAD_MODULE}.") for name in self.entries)
        return self.embedding_bits if tied else 8 if self.format.lm_head is not None else 16

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(map(num_weights, self.specs.values()))

    @property
    def recipe(self) -> str:
        """The present name of the recipe: `paper` without calibration text was renamed to `data-free`."""
        provenance = self.format.provenance
        renamed = provenance.recipe == "paper" and not provenance.calibration
        return "data-free" if renamed else provenance.recipe


def split_bits(specs: Mapping[str, LayerSpec]) -> dict[str, float]:
    """Return the bits per quantized weight by purpose; their sum is that of everything."""
    weights = sum(map(num_weights, specs.values()))
    bits = dict.fromkeys(PARTS.values(), 0.0)
    for name, spec in specs.items():
        for key, tensor in stored_specs(name, replace(spec, bias=False)).items():
            bits[PARTS[key]] += tensor_bits(tensor) / weights
    return bits


def split_bytes(entries: Mapping[str, Entry], linears: Iterable[str]) -> dict[str, int]:
    """Return the bytes of all tensors, by part of the model.

    Args:
        entries: the tensors of a BWLA checkpoint or of its original.
        linears: module paths of the quantized linears.
    """
    quantized = set(linears)
    sizes = dict.fromkeys((LINEARS, HEAD, EMBEDDINGS, REST), 0)
    for name, entry in entries.items():
        module, _, key = name.rpartition(".")
        if module in quantized and (key in PARTS or key == "weight"):
            sizes[LINEARS] += entry_bytes(entry)
        elif module == HEAD_MODULE:
            sizes[HEAD] += entry_bytes(entry)
        elif module == EMBEDDING_MODULE:
            sizes[EMBEDDINGS] += entry_bytes(entry)
        else:
            sizes[REST] += entry_bytes(entry)
    return sizes


def read_contents(folder: Path) -> Contents:
    """Read config and headers of a checkpoint, and check them as the loaders do.

    Raises:
        FormatError: the folder is not a complete BWLA checkpoint.
    """
    entries = read_folder(folder)
    specs = check_folder(folder, entries)
    head_spec = specs.pop(HEAD_MODULE, None)
    config = read_json(folder / "config.json")
    format_ = parse_config(config["quantization_config"], str(folder / "config.json"))
    bits, sizes = split_bits(specs), split_bytes(entries, specs)
    in_order = dict(sorted(specs.items(), key=_place))
    return Contents(folder, format_, in_order, entries, bits, sizes, head_spec)


def _place(item: tuple[str, LayerSpec]) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that puts decoder layer 10 after layer 9."""
    parts = [(int(part) if part.isdecimal() else -1, part) for part in item[0].split(".")]
    return parts, item[0]


def describe_vocabulary_bits(bits: int) -> str:
    """Describe how a head or an embedding is stored, by its bits as in `Contents.head_bits`."""
    if bits == 16:
        return "unquantized"
    return "8 bits" if bits == 8 else describe_planes(bits)


def describe_weights(planes: Iterable[int]) -> str:
    """Describe weights with these numbers of planes: "1-bit weights", or "weights of 1 to 3 binary planes"."""
    counts = sorted(set(planes))
    if counts == [1]:
        return "1-bit weights"
    return f"weights of {' to '.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} binary planes"


def layer_row(name: str, spec: LayerSpec) -> dict[str, object]:
    """Describe a quantized linear as plain data."""
    return {
        "name": name,
        "shape": [spec.out_features, spec.in_features],
        "rotation": [spec.rotation_groups, spec.n1, spec.n2],
        "planes": spec.planes,
        "rank": spec.rank,
        "activation_bits": spec.bits,
        "bits_per_weight": round(stored_bits(name, spec) / num_weights(spec), 4),
        "bytes": stored_bits(name, spec) // 8,
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
