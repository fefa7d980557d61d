"""What can be settled about a checkpoint before an engine starts: from its headers, without reading a tensor."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import INPUT_SHARDED_LINEARS
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.files import INDEX_FILE, SINGLE_FILE, read_folder, read_json
from bwla_kernels.format.folder import check_folder
from bwla_kernels.format.model import check_model, check_plain_values
from torch import nn
from vllm.logger import init_logger

logger = init_logger("vllm.bwla")

ADVICE = "convert or download the model again"

OUTPUT_SHARDED = {"gate_proj": 1, "up_proj": 1, "gate_up_proj": 2}
"""Linears cut along their output, and how many one stored tensor holds; q, k and v vLLM checks by heads itself."""


def local_folder(model: str, revision: str | None = None) -> str | None:
    """Where the weights of `model` are on this machine.

    Args:
        model: a folder, or a Hub id that is looked up in the Hub's local cache; nothing is downloaded.
        revision: the Hub revision.

    Returns: the folder, or None where no weights or not all of them are there (a dummy load needs none,
        a Hub model may still be downloaded).

    Raises:
        FormatError: the cached index is not JSON.
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
        weight_map = read_json(index).get("weight_map") if index else None
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else {SINGLE_FILE}
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
    if model is not None and not check_model(model, specs, entries, folder):
        logger.info("transformers names this model's layers differently: BWLA checks sizes while loading")
    check_plain_values(folder, entries, specs)
    return specs


def check_tensor_parallel(specs: Mapping[str, LayerSpec], ranks: int) -> None:
    """Check that every layer can be cut into `ranks` equal parts.

    Raises:
        FormatError: a layer whose rows or rotation blocks `ranks` does not divide.
    """
    for name, spec in specs.items():
        leaf = name.rpartition(".")[2]
        rows = spec.out_features // OUTPUT_SHARDED.get(leaf, 1)
        if leaf in OUTPUT_SHARDED and rows % ranks:
            raise FormatError(
                f"{name}: expected a tensor-parallel size that divides its {rows} rows, "
                f"found {ranks}: choose another --tensor-parallel-size"
            )
        if leaf in INPUT_SHARDED_LINEARS:
            check_rotation_groups(name, spec, ranks)


def check_rotation_groups(name: str, spec: LayerSpec, ranks: int) -> None:
    """Check that `ranks` ranks can hold whole rotation blocks of the layer called `name`.

    Raises:
        FormatError: they cannot.
    """
    if spec.rotation_groups % ranks:
        raise FormatError(
            f"{name}: expected a tensor-parallel size that divides its {spec.rotation_groups} rotation blocks, found "
            f"{ranks}: choose another --tensor-parallel-size, or convert the model again with more blocks"
        )


def _skeleton(hf_config: Any) -> nn.Module | None:
    """The model's module tree on the meta device (shapes, no memory); None where transformers has no such model.

    Raises:
        FormatError: transformers has such a model, but cannot build it from this config.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(hf_config)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # any model code may run here
        reason = " ".join(str(error).split())
        if "Unrecognized configuration class" in reason:  # without a skeleton only this check is lost
            logger.info("transformers has no such language model: BWLA checks its sizes while loading")
            return None
        raise FormatError(
            f"config.json: transformers cannot build this model ({reason:.200}): restore the config.json that "
            "bwla-convert wrote"
        ) from None
    return model
