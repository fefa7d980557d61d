"""Build the model that a config.json describes, without memory for its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bwla_kernels.errors import SourceError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

MAX_LAYERS = 10_000
"""Largest accepted num_hidden_layers. More means that config.json is damaged, and would take hours to build."""


def build_meta_model(folder: Path, config: Mapping[str, Any]) -> PreTrainedModel:
    """Build the model that the config.json in `folder` describes on the meta device, without memory for its weights.

    Args:
        folder: a folder with a config.json.
        config: its contents.

    Raises:
        SourceError: transformers cannot build the model.
    """
    num_layers = config.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > MAX_LAYERS:
        raise SourceError(
            f"{folder / 'config.json'}: expected at most {MAX_LAYERS} num_hidden_layers, found {num_layers}: "
            "restore the model's own config.json"
        )
    try:
        with torch.device("meta"):
            hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(hf_config)
    except Exception as cause:  # transformers raises many types of exceptions for an inconsistent config
        reason = " ".join(str(cause).split())
        raise SourceError(
            f"{folder / 'config.json'}: transformers cannot build this model ({reason:.300}): "
            "restore the model's own config.json"
        ) from None
    return model
