"""What can be settled about a checkpoint before an engine starts: from its headers, without reading a tensor."""

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.folder import INDEX_FILE, SINGLE_FILE, Entry, check_folder, read_folder, read_json
from torch import nn
from vllm.logger import init_logger

logger = init_logger("vllm.bwla")

ADVICE = "convert or download the model again"

INPUT_SHARDED = ("o_proj", "down_proj")
"""Linears that tensor parallelism cuts along their input: a rank must hold whole rotation blocks."""

OUTPUT_SHARDED = ("gate_proj", "up_proj")
"""Linears cut along their output, besides q, k and v, whose head counts vLLM checks itself."""

_BLOCK_INDEX = re.compile(r"\.\d+\.")


def local_folder(model: str, revision: str | None = None) -> str | None:
    """Where the weights of `model` are on this machine.

    Args:
        model: a folder, or a Hub id that is looked up in the Hub's local cache; nothing is downloaded.
        revision: the Hub revision.

    Returns: the folder, or None where no weights or not all of them are there (a dummy load needs none,
        a Hub model may still be downloaded).
    """
    path = Path(model)
    if path.is_dir():
        return model if any(path.glob("*.safetensors*")) else None

    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(file: str) -> Path | None:
        found = try_to_load_from_cache(model, file, revision=revision)
        return Path(found) if isinstance(found, str) else None

    try:
        config, index, single = cached("config.json"), cached(INDEX_FILE), cached(SINGLE_FILE)
        if config is None or (index is None and single is None):
            return None
        shards = set(read_json(index).get("weight_map", {}).values()) if index else {SINGLE_FILE}
        complete = all(cached(str(shard)) is not None for shard in shards)
    except HFValidationError:  # neither a folder nor a Hub id: object storage, for example
        return None
    return str(config.parent) if complete else None


def check_checkpoint(folder: Path, hf_config: Any = None) -> dict[str, LayerSpec]:
    """Check a checkpoint folder and that it fits the model that its config.json describes.

    Args:
        folder: the checkpoint.
        hf_config: transformers' config of the model; without it only the folder itself is checked.

    Returns: the full sizes of every quantized linear, by name.

    Raises:
        FormatError: the first problem found, naming file and tensor.
    """
    entries = read_folder(folder)
    specs = check_folder(folder, entries)
    model = None if hf_config is None else _skeleton(hf_config)
    if model is not None:
        problem = next(_model_problems(model, specs, entries, folder), None)
        if problem:
            raise FormatError(f"{problem}; {ADVICE}")
    return specs


def check_tensor_parallel(specs: Mapping[str, LayerSpec], ranks: int) -> None:
    """Check that every layer can be cut into `ranks` equal parts.

    Raises:
        FormatError: a layer whose rows or rotation blocks `ranks` does not divide.
    """
    for name, spec in specs.items():
        leaf = name.rpartition(".")[2]
        if leaf in OUTPUT_SHARDED and spec.out_features % ranks:
            raise FormatError(
                f"{name}: expected a tensor-parallel size that divides its {spec.out_features} rows, "
                f"found {ranks}: choose another --tensor-parallel-size"
            )
        if leaf in INPUT_SHARDED:
            check_blocks(name, spec, ranks)


def check_blocks(name: str, spec: LayerSpec, ranks: int) -> None:
    """Check that `ranks` ranks can hold whole rotation blocks of the layer called `name`.

    Raises:
        FormatError: they cannot.
    """
    if spec.blocks % ranks:
        raise FormatError(
            f"{name}: expected a tensor-parallel size that divides its {spec.blocks} rotation blocks, found "
            f"{ranks}: choose another --tensor-parallel-size, or convert the model again with more blocks"
        )


def _skeleton(hf_config: Any) -> nn.Module | None:
    """The model's module tree on the meta device (shapes, no memory); None where transformers has no such model."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(hf_config)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # any model code may run here; without a skeleton only this check is lost
        logger.info("transformers cannot outline this model (%s): BWLA checks its sizes while loading", error)
        return None
    return model


def _model_problems(
    model: nn.Module, specs: Mapping[str, LayerSpec], entries: Mapping[str, Entry], folder: Path
) -> Iterator[str]:
    """Say in words how a checkpoint differs from the model it should fill.

    vLLM does not notice: it skips its own completeness check for quantized models, leaves a missing tensor
    uninitialised and narrows an oversized one.
    """
    modules = dict(model.named_modules())
    if not all(isinstance(modules.get(name), nn.Linear) for name in specs):
        logger.info("transformers names this model's layers differently: BWLA checks sizes while loading")
        return
    for name, spec in specs.items():
        linear = modules[name]
        stored, outlined = [spec.out_features, spec.in_features], [linear.out_features, linear.in_features]
        if stored != outlined:
            yield f"{folder}: {name}: expected the sizes {outlined} that config.json describes, found {stored}"
        if spec.bias != (linear.bias is not None):
            yield f"{folder}: {name}.bias: expected {_presence(not spec.bias)}, found {_presence(spec.bias)}"
    stored_kinds = {_BLOCK_INDEX.sub(".*.", key) for key in entries}
    for key, parameter in model.named_parameters():
        owner = key.rpartition(".")[0]
        if owner in specs or f"{owner}.weight_int8" in entries:
            continue  # `check_folder` has seen these
        wanted = list(parameter.shape)
        if key in entries:
            if list(entries[key].shape) != wanted:
                file, found = folder / entries[key].file, list(entries[key].shape)
                yield f"{file}: {key}: expected the shape {wanted} that config.json describes, found {found}"
        # A kind of tensor that no block has on disk is a matter of names (fused experts), not a loss.
        elif not _BLOCK_INDEX.search(key) or _BLOCK_INDEX.sub(".*.", key) in stored_kinds:
            yield f"{folder}: {key} is missing, expected shape {wanted}"
        elif isinstance(modules[owner], nn.Linear):
            yield f"{folder}: {owner} is missing, expected its weight {wanted} or its one-bit tensors"


def _presence(there: bool) -> str:
    return "a bias" if there else "no bias"
