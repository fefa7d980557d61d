"""The model to convert: found, checked before any work, and read lazily, one decoder block at a time."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bwla_converter.families import Family, Group, find_family
from bwla_kernels.errors import FormatError, SourceError
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format.folder import Entry, read_folder, read_json, read_tensors
from bwla_kernels.format.schema import is_ignored
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_LISTED = 20


@dataclass(frozen=True)
class Source:
    """A checkpoint folder with its headers read.

    Attributes:
        folder: where the files are.
        config: config.json.
        family: where this architecture keeps its linears.
        entries: every tensor's file, shape and dtype.
        num_blocks: decoder blocks, as transformers reads config.json.
        tied_head: whether the head is the embedding, used again.
        revision: commit of a Hub snapshot, else empty.
        ignore: linears to leave as they are, see `bwla_kernels.format.schema.is_ignored`.
    """

    folder: Path
    config: Mapping[str, Any]
    family: Family
    entries: Mapping[str, Entry]
    num_blocks: int
    tied_head: bool
    revision: str = ""
    ignore: tuple[str, ...] = ()

    def groups_of_block(self, index: int) -> Iterator[tuple[Group, list[str]]]:
        """The input groups of a decoder block that are to be quantized, with the names of their linears.

        Raises:
            SourceError: a group of which `ignore` names some members and not the others.
        """
        for group in self.family.groups:
            names = [f"{self.family.block_name(index)}.{member}" for member in group.members]
            ignored = [name for name in names if is_ignored(name, self.ignore)]
            if ignored and len(ignored) < len(names):
                raise SourceError(
                    f"{ignored[0]}: shares its input with {', '.join(name for name in names if name not in ignored)}, "
                    "so they can only be ignored together: name them all with --ignore, or none"
                )
            if not ignored:
                yield group, names

    def names_of_block(self, index: int) -> list[str]:
        """Names of all tensors of one decoder block."""
        prefix = self.family.block_name(index) + "."
        return [name for name in self.entries if name.startswith(prefix)]

    def names_outside_blocks(self) -> list[str]:
        """Names of the tensors that belong to no decoder block: embeddings, final norm, head."""
        prefix = self.family.blocks + "."
        return [name for name in self.entries if not name.startswith(prefix)]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors by name, file by file; nothing else is brought into memory."""
        return read_tensors(self.folder, self.entries, names)


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
    outline = outline_model(folder)
    entries = read_folder(folder, SourceError)
    tied = bool(outline.config.tie_word_embeddings)
    source = Source(
        folder, config, family, entries, outline.config.num_hidden_layers, tied, revision, tuple(ignore)
    )
    _refuse(folder, [*_tensor_problems(source, outline), *_width_problems(source)])
    return source


def check_values(
    source: Source, head: str | None = None, on_tensor: Callable[[str], None] = lambda name: None
) -> None:
    """Read every weight that will be quantized once and refuse NaN and infinity.

    Args:
        source: the model.
        head: name of the tensor that the 8-bit head is made from, if any.
        on_tensor: called with the name of each weight that was read.

    Raises:
        SourceError: the list of offending tensors.
    """
    problems = []
    for name in [*_linear_weights(source), *([head] if head else [])]:
        if not torch.isfinite(source.read([name])[name]).all():
            problems.append(
                f"{source.entries[name].file}: {name} holds NaN or infinity, expected finite values"
            )
        on_tensor(name)
    _refuse(source.folder, problems)


def _linear_weights(source: Source) -> Iterator[str]:
    for index in range(source.num_blocks):
        for _, names in source.groups_of_block(index):
            yield from (f"{name}.weight" for name in names)


def outline_model(folder: Path) -> PreTrainedModel:
    """The model that transformers builds from config.json, without storage."""
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as cause:  # transformers raises many kinds for a config that contradicts itself
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{folder / 'config.json'}: transformers cannot build this model ({reason:.300}): "
            "restore the model's own config.json"
        ) from None
    return model


def _tensor_problems(source: Source, outline: PreTrainedModel) -> Iterator[str]:
    """Compare the stored tensors with those of the model that transformers builds from the config."""
    wanted = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    tied = set(outline.all_tied_weights_keys) if source.tied_head else set()
    for name, shape in wanted.items():
        entry = source.entries.get(name)
        if entry is None:
            if name not in tied:
                yield f"{name} is missing, expected shape {list(shape)}"
        elif entry.shape != shape:
            yield f"{entry.file}: {name}: expected shape {list(shape)}, found {list(entry.shape)}"
        elif entry.dtype not in SUPPORTED_DTYPES:
            yield f"{entry.file}: {name}: expected bfloat16, float16 or float32, found {entry.dtype}"
    ours = source.family.blocks + "."
    for name in source.entries:
        # Old checkpoints carry buffers that the model computes itself.
        if name.startswith(ours) and name not in wanted and not name.endswith("rotary_emb.inv_freq"):
            yield f"{source.entries[name].file}: {name} is not a tensor of {source.family.architecture}"


def _width_problems(source: Source) -> Iterator[str]:
    for group, names in source.groups_of_block(0):
        name = f"{names[0]}.weight"
        entry = source.entries.get(name)
        if entry is not None and len(entry.shape) == 2:
            try:
                choose_rotation(entry.shape[1], group.wished_blocks)
            except FormatError as problem:
                yield f"{entry.file}: {name}: {problem}"


def _refuse(folder: Path, problems: list[str]) -> None:
    if not problems:
        return
    shown = problems[:MAX_LISTED]
    more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    lines = "".join(f"\n  {problem}" for problem in shown)
    raise SourceError(f"{folder}: cannot be converted, found {len(problems)} problem(s):{lines}{more}")
