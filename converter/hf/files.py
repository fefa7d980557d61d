"""Checks of a checkpoint that transformers loads, before and after it reads weights, and what it saves."""

from collections.abc import Mapping
from pathlib import Path

import torch
from bwla_converter.hf.modules import BWLAEmbedding, BWLAHead, BWLALinear, BWLATiedHead
from bwla_converter.hf.replace import module_paths
from bwla_converter.source.observe.names import stored_tensors, tied_names
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec, validate_layer
from bwla_kernels.format.experts import expert_of
from bwla_kernels.format.files import Entry, read_json
from bwla_kernels.format.folder import check_folder
from bwla_kernels.format.head import HEAD_MODULE, INT8_SUFFIX, validate_head
from bwla_kernels.format.model import changed_size, config_values, not_finite
from bwla_kernels.format.schema import BWLAFormat, parse_config
from bwla_kernels.format.tensors import NOT_LISTED, describe_tensors
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger("transformers.bwla")


def check_files(model: nn.Module, folder: Path) -> Mapping[str, LayerSpec]:
    """Check a checkpoint folder by its headers, and that the model has its quantized linears.

    Args:
        model: the model before its linears are replaced, usually on the meta device. Parameters that no checkpoint of
            a language model holds (those of another head) are initialized by transformers, which reports it.
        folder: the checkpoint.

    Returns: the specs of the checkpoint's quantized linears, by module path.

    Raises:
        FormatError: the first problem, with its file and tensor.
    """
    specs = check_folder(folder)
    stored = parse_config(read_json(folder / "config.json")["quantization_config"])
    if stored.tensors is None:
        logger.info("%s was %s", folder, NOT_LISTED)
    changed = changed_size(stored.config or {}, getattr(model, "config", None))
    if changed is not None:
        key, wanted, found = changed
        raise FormatError(
            f"{folder / 'config.json'}: expected {key} {wanted}, as when the tensors were written, found {found}: "
            "restore this value, and do not pass another one to from_pretrained"
        )
    named, paths = dict(model.named_modules()), module_paths(model, specs)
    missing = next(
        (
            name
            for name, path in paths.items()
            if expert_of(name) is None and not isinstance(named.get(path), nn.Linear)
        ),
        None,
    )
    if missing is not None:
        raise FormatError(
            f"{folder}: expected {type(model).__name__} to have the linears of the checkpoint, found none called "
            f"{missing}: load the checkpoint with AutoModelForCausalLM"
        )
    return specs


def describe_saved(model: PreTrainedModel, stored: BWLAFormat) -> BWLAFormat:
    """Return the `quantization_config` for a model that is about to be saved, which may have changed since.

    Args:
        model: the model.
        stored: its quantization config.
    """
    tied = tied_names(model)
    entries = {
        name: Entry("", tuple(tensor.shape), tensor.dtype)
        for name, tensor in stored_tensors(model, without=tied).items()
    }
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    described: dict[str, object] = {
        "tensors": describe_tensors(entries, {}),
        "config": config_values(config),
        "linears": None,
    }
    if f"{HEAD_MODULE}{INT8_SUFFIX}" not in entries:
        described["lm_head"] = None  # a model with another head does not have it
    return stored.model_copy(update=described)


def cast_renamed(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters that a loaded model has in another dtype than the one that was asked for.

    transformers keeps the stored dtype of a tensor that it renames, because it takes it for part of the quantization.

    Args:
        model: the model.
        dtype: the dtype that was asked for. Modules that the class keeps in float32 stay as they are.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def check_loaded(model: nn.Module) -> None:
    """Check the values of every parameter of a loaded model.

    Raises:
        FormatError: the first tensor with invalid values.
    """
    for name, module in model.named_modules():
        if isinstance(module, BWLALinear):
            validate_layer(name, module.stored(), module.spec)
        elif isinstance(module, BWLATiedHead):
            continue  # its tensors are the embedding's
        elif isinstance(module, BWLAHead | BWLAEmbedding):
            validate_head(module.stored(), module.spec, name)
        else:
            for key, parameter in module.named_parameters(recurse=False):
                if not_finite(parameter):
                    raise FormatError(
                        f"{name}.{key}: expected finite values, found NaN or infinity; "
                        "convert or download the model again"
                    )
