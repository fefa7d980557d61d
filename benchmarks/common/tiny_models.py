"""Tiny random models of every supported family, written as Hugging Face folders, for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bwla_converter.source.families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}

OWN_SIZES: Mapping[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 32},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"pad_token_id": 0},
}
"""Further settings of a family, by transformers' model type."""


def build_model(family: str, lively: bool = False, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Return a random float32 model of a family.

    Args:
        family: a name in `FAMILIES`.
        lively: draw weights that are large enough for each one to matter to the logits, unlike transformers' own.
        seed: seed of the weights.
        config: changes to the tiny configuration.
    """
    entry = next(entry for entry in FAMILIES if entry.name == family)
    torch.manual_seed(seed)
    sizes = {**SIZES, **OWN_SIZES.get(entry.model_type, {}), **config}
    settings = AutoConfig.for_model(entry.model_type, **sizes, architectures=[entry.architecture])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers initializes biases with zeros, with which a lost bias would not be noticed.
            if name.endswith("bias"):
                parameter.normal_()
            elif lively and parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif lively:
                parameter.normal_(std=0.3)
    return model.eval()


def write_model(
    folder: Path, family: str = "Qwen3", shards: int = 1, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Path:
    """Write `build_model(family, **options)` to `folder` in about `shards` files; return the folder."""
    model = build_model(family, **options).to(dtype)
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    limit = max(*sizes, sum(sizes) // shards) if shards > 1 else "1GB"
    model.save_pretrained(folder, max_shard_size=limit)
    return folder
