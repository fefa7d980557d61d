"""The model to convert: found, checked before any work, and read lazily, one decoder block at a time."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bwla_converter.source import fp8
from bwla_converter.source.families import Family, InputGroup, find_family
from bwla_kernels.errors import FormatError, SourceError
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format.files import Entry, Scan, read_json, read_tensors, scan_folder
from bwla_kernels.format.layer import FLOAT_DTYPES
from bwla_kernels.format.model import COMPUTED, not_finite, tied_conflict, tied_names
from bwla_kernels.format.schema import is_ignored
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
MAX_LISTED = 20
MAX_BLOCKS = 10_000
"""Decoder blocks that config.json may ask for; only a damaged one asks for more, and would take hours to outline."""


@dataclass(frozen=True)
class Source:
    """A checkpoint folder with its headers read.

    Attributes:
        folder: where the files are.
        config: config.json.
        family: where this architecture keeps its linears.
        entries: every tensor's file, shape and dtype, fp8 weights as the bfloat16 that `read` makes of them.
        num_layers: decoder blocks, as transformers reads config.json.
        tied_head: whether the head is the embedding, used again.
        revision: commit of a Hub snapshot, else empty.
        ignore: linears to leave as they are, see `bwla_kernels.format.schema.is_ignored`.
        stored: every tensor as it is in the files, scales of fp8 weights too; empty where there are no files.
        tied: name of a tensor -> name of the one that takes its place, by config.json.
        block: rows and columns that share a scale, where fp8 weights have one a block.
    """

    folder: Path
    config: Mapping[str, Any]
    family: Family
    entries: Mapping[str, Entry]
    num_layers: int
    tied_head: bool
    revision: str = ""
    ignore: tuple[str, ...] = ()
    stored: Mapping[str, Entry] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    block: tuple[int, int] | None = None

    def groups_of_layer(self, index: int) -> Iterator[tuple[InputGroup, list[str]]]:
        """The input groups of a decoder block that are to be quantized, with the names of their linears.

        Raises:
            SourceError: a group of which `ignore` names some members and not the others.
        """
        for group in self.family.groups:
            names = [f"{self.family.layer_name(index)}.{member}" for member in group.members]
            ignored = [name for name in names if is_ignored(name, self.ignore)]
            if ignored and len(ignored) < len(names):
                raise SourceError(
                    f"{ignored[0]}: shares its input with {', '.join(name for name in names if name not in ignored)}, "
                    "so they can only be ignored together: name them all with --ignore, or none"
                )
            if not ignored:
                yield group, names

    def linears_of_layer(self, index: int) -> list[str]:
        """The linears of a decoder block that are to be quantized. Raises as `groups_of_layer`."""
        return [name for _, names in self.groups_of_layer(index) for name in names]

    def names_of_layer(self, index: int) -> list[str]:
        """Names of all tensors of one decoder block."""
        prefix = self.family.layer_name(index) + "."
        return [name for name in self.entries if name.startswith(prefix)]

    def names_outside_layers(self) -> list[str]:
        """Names of the tensors that belong to no decoder block: embeddings, final norm, head."""
        prefix = self.family.blocks + "."
        return [name for name in self.entries if not name.startswith(prefix)]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors by name, file by file; nothing else is brought into memory. fp8 weights are dequantized."""
        scaled = [name for name in names if self.stored[name].dtype == torch.float8_e4m3fn]
        scales = {name: scale for name in scaled if (scale := fp8.scale_name(name, self.stored))}
        found = read_tensors(self.folder, self.stored, [*names, *scales.values()])
        weights = {
            name: fp8.dequantize(found[name], found[scale], self.block) for name, scale in scales.items()
        }
        return {name: weights.get(name, found[name]) for name in names}


def locate(model: str) -> tuple[Path, str]:
    """Find a model: a folder, or a Hub id that is downloaded (safetensors and text files only).

    Returns: the folder and, for a Hub id, the commit.

    Raises:
        SourceError: neither a folder nor a Hub id that can be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path, ""
    if path.exists() or not HUB_ID.fullmatch(model):
        raise SourceError(
            f"{model}: expected a folder or a Hub id like Qwen/Qwen3-8B, found neither: check the path"
        )
    try:
        snapshot = Path(snapshot_download(model, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as cause:
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise SourceError(
            f"{model}: no such folder, and the Hub did not give it ({reason}): "
            "check the name and the network, or give a folder"
        ) from None
    return snapshot, snapshot.name


def open_source(model: str, ignore: Sequence[str] = ()) -> Source:
    """Find a model, read its headers and check that it can be converted, values aside (`check_values`).

    Raises:
        SourceError: one sentence for the first structural problem, or a list of all offending tensors.
    """
    folder, revision = locate(model)
    config_path = folder / "config.json"
    config = read_json(config_path, SourceError)
    family = find_family(config, str(config_path))
    quantization = _quantization(config, str(config_path))
    outline = outline_model(folder, config)
    scan = scan_folder(folder)
    source = Source(
        folder,
        config,
        family,
        fp8.plain_view(scan.entries) if quantization else scan.entries,
        outline.config.num_hidden_layers,
        bool(outline.config.tie_word_embeddings),
        revision,
        tuple(ignore),
        scan.entries,
        tied_names(outline),
        fp8.block_size(quantization),
    )
    problems = [*scan.problems, *fp8.scale_problems(scan.entries, source.block)]
    _refuse(folder, [*problems, *_tensor_problems(source, outline, scan), *_width_problems(source)])
    return source


def _quantization(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The `quantization_config` of fp8 weights, which can be undone; empty where nothing is quantized.

    Raises:
        SourceError: the model is quantized in another way.
    """
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise SourceError(
            f"{path}: expected quantization_config to be an object, found {quantization!r:.60}: restore config.json"
        )
    if quantization and not fp8.is_fp8(quantization):
        method = quantization.get("quant_method", "an unnamed method")
        raise SourceError(
            f"{path}: expected an unquantized model or fp8 weights, found one quantized with {method}: "
            "convert the original checkpoint instead"
        )
    return quantization


def check_values(
    source: Source, head: str | None = None, on_tensor: Callable[[str], None] = lambda name: None
) -> None:
    """Read every tensor once and refuse NaN and infinity.

    Args:
        source: the model.
        head: name of the tensor that the 8-bit head is made from, if any.
        on_tensor: called with the name of each weight that will be quantized, when it was read.

    Raises:
        SourceError: the list of offending tensors.
    """
    quantized = {*_linear_weights(source), *([head] if head else [])}
    problems = []
    for name, entry in source.entries.items():
        if not_finite(source.read([name])[name]):
            problems.append(f"{entry.file}: {name} holds NaN or infinity, expected finite values")
        if name in quantized:
            on_tensor(name)
    problems += filter(None, [tied_conflict(source.folder, source.stored, source.tied)])
    _refuse(source.folder, problems)


def _linear_weights(source: Source) -> Iterator[str]:
    for index in range(source.num_layers):
        yield from (f"{name}.weight" for name in source.linears_of_layer(index))


def outline_model(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
    """The model that transformers builds from the config.json in `folder`, which is `config`, without storage.

    Raises:
        SourceError: transformers cannot make sense of it.
    """
    blocks = config.get("num_hidden_layers")
    if isinstance(blocks, int) and blocks > MAX_BLOCKS:
        raise SourceError(
            f"{folder / 'config.json'}: expected at most {MAX_BLOCKS} num_hidden_layers, found {blocks}: "
            "restore the model's own config.json"
        )
    try:
        with torch.device("meta"):
            known = AutoConfig.from_pretrained(folder, local_files_only=True)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(known)
    except Exception as cause:  # transformers raises many kinds for a config that contradicts itself
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{folder / 'config.json'}: transformers cannot build this model ({reason:.300}): "
            "restore the model's own config.json"
        ) from None
    return model


def _tensor_problems(source: Source, outline: PreTrainedModel, scan: Scan) -> Iterator[str]:
    """Compare the stored tensors with those of the model that transformers builds from the config."""
    built = type(outline).__name__
    if built != source.family.architecture:
        yield f"config.json: expected the model_type of {source.family.architecture}, found that of {built}"
    wanted = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    for name, shape in wanted.items():
        entry = source.entries.get(name)
        if entry is None:
            if name not in source.tied and name not in scan.lost:
                yield f"{name} is missing, expected shape {list(shape)}"
        elif entry.shape != shape:
            yield f"{entry.file}: {name}: expected shape {list(shape)}, found {list(entry.shape)}"
        elif entry.dtype not in FLOAT_DTYPES and scan.entries[name].dtype != torch.float8_e4m3fn:
            yield f"{entry.file}: {name}: expected bfloat16, float16, float32 or scaled fp8, found {entry.dtype}"
    for name in source.entries:
        # Old checkpoints carry buffers that the model computes itself.
        if name not in wanted and not name.endswith(COMPUTED):
            yield f"{source.entries[name].file}: {name} is not a tensor of {source.family.architecture}"


def _width_problems(source: Source) -> Iterator[str]:
    for group, names in source.groups_of_layer(0):
        name = f"{names[0]}.weight"
        entry = source.entries.get(name)
        if entry is not None and len(entry.shape) == 2:
            try:
                choose_rotation(entry.shape[1], group.preferred_rotation_groups)
            except FormatError as problem:
                yield f"{entry.file}: {name}: {problem}"


def _refuse(folder: Path, problems: list[str]) -> None:
    if not problems:
        return
    shown = problems[:MAX_LISTED]
    more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    lines = "".join(f"\n  {problem}" for problem in shown)
    raise SourceError(f"{folder}: cannot be converted, found {len(problems)} problem(s):{lines}{more}")
