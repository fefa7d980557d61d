"""Layout of a converted checkpoint: its parts, its config.json and the final check."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bwla_converter.checkpoint.merge import part_name
from bwla_converter.checkpoint.writer import OutputError, existing_parent
from bwla_converter.common.tensors import entry_bytes
from bwla_converter.planning.disk import PART_BYTES
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.source.model import Source
from bwla_kernels.format import LayerSpec, validate_layer
from bwla_kernels.format.experts import experts_module, stored_names
from bwla_kernels.format.folder import Entry, check_folder, read_folder, read_tensors
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE, HeadSpec, head_tensor_specs, validate_head
from bwla_kernels.format.model import config_values
from bwla_kernels.format.tensors import describe_tensors
from bwla_kernels.head import quantize_head
from torch import Tensor


def verify(folder: Path) -> None:
    """Read a finished checkpoint back and check the tensors of every quantized linear.

    Raises:
        FormatError: a tensor is missing or invalid; the message names file and tensor.
    """
    entries = read_folder(folder)
    together: dict[str, dict[str, LayerSpec]] = {}
    for name, spec in check_folder(folder, entries).items():
        together.setdefault(experts_module(name) or name, {})[name] = spec
    for specs in together.values():
        # The experts of a layer are read at once: they share tensors, and reading opens a file.
        sources = {name: stored_names(name, spec) for name, spec in specs.items()}
        needed = dict.fromkeys(name for source in sources.values() for name in source.values())
        stored = read_tensors(folder, entries, list(needed))
        for name, spec in specs.items():
            validate_layer(name, {key: stored[source] for key, source in sources[name].items()}, spec)
    for module in (HEAD_MODULE, EMBEDDING_MODULE):
        if f"{module}.weight_int8" in entries:
            read_int8(folder, entries, module)


def read_int8(folder: Path, entries: Mapping[str, Entry], module: str) -> dict[str, Tensor]:
    """Read and check the 8-bit head or embedding called `module`; return its tensors by their names in the format.

    Raises:
        FormatError: a tensor is missing or invalid.
    """
    spec = HeadSpec(*entries[f"{module}.weight_int8"].shape)
    stored = read_tensors(folder, entries, [f"{module}.{key}" for key in head_tensor_specs(spec)])
    tensors = {key.removeprefix(f"{module}."): tensor for key, tensor in stored.items()}
    validate_head(tensors, spec, module)
    return tensors


def int8_tensors(plan: ConversionPlan, name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Quantize the head or the embedding that is made from the source's tensor `name`.

    Args:
        plan: what will be written.
        name: name of a tensor of the source.
        read: returns the source's tensor of a name.

    Returns: the 8-bit tensors by stored name; empty if none are made from that tensor.
    """
    return {
        f"{module}.{key}": value
        for module, source_name in plan.int8_sources.items()
        if source_name == name
        for key, value in quantize_head(read(name)).items()
    }


def output_config(
    source: Source, plan: ConversionPlan, entries: Mapping[str, Entry] | None
) -> dict[str, Any]:
    """Return the output's config.json; with an 8-bit head of its own, a model is no longer tied.

    Args:
        source: the model that was converted.
        plan: what was written.
        entries: the output's tensors, which the config lists for loaders; None if none are written, because a loader
            is to make them up (vLLM's `--load-format dummy`).
    """
    untied = {"tie_word_embeddings": False} if plan.head_source else {}
    config = {**source.config, **untied}
    config.pop("quantization", None)  # MLX's, of weights that are stored otherwise now
    described = {
        "tensors": None if entries is None else describe_tensors(entries, source.tied),
        "config": config_values(config, source.defaults),
    }
    return {**config, "quantization_config": plan.format.model_copy(update=described).to_json()}


def check_space(out: Path, needed: float) -> None:
    """Raise if the disk is too full for the output.

    Raises:
        OutputError: less than `needed` bytes plus 2 % for headers are free.
    """
    free = shutil.disk_usage(existing_parent(out)).free
    if needed * 1.02 > free:
        raise OutputError(
            f"{out}: expected {needed / 1e9:.2f} GB of free disk space, found {free / 1e9:.2f} GB: free some space"
        )


class Parts:
    """Files of the unfinished output: one for each decoder layer, then files of up to 4 GiB with all other tensors."""

    def __init__(self, source: Source) -> None:
        self._num_layers = source.num_layers
        self._rest: list[list[str]] = []
        size = PART_BYTES
        for name in source.names_outside_layers():
            bytes_ = entry_bytes(source.entries[name])
            if size + bytes_ > PART_BYTES:
                self._rest.append([])
                size = 0
            self._rest[-1].append(name)
            size += bytes_

    def layer_file(self, index: int) -> str:
        """Return the file of decoder layer `index`."""
        return part_name(index)

    def rest(self) -> list[tuple[str, list[str]]]:
        """Return the files with the tensors outside the decoder layers, each with the source's tensor names."""
        return [(part_name(self._num_layers + number), names) for number, names in enumerate(self._rest)]
