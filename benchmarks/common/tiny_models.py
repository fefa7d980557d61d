"""Tiny random models of the families that most tests use, written as Hugging Face folders.

`benchmarks.coverage` has one of every architecture that is tried.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        architecture: its class in config.json's `architectures`.
        model_type: transformers' name of its configuration.
        settings: settings besides `SIZES`.
        merged: whether q, k and v are one linear, and gate and up are one.
        int8_embedding: whether vLLM's class lets the plugin choose how the embedding is stored.
    """

    architecture: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    merged: bool = False
    int8_embedding: bool = True

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Leaf names of a decoder layer's linears, those that read the same input together, in execution order."""
        if self.merged:
            return (("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",))
        return (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


_GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": 32}

FAMILIES: Mapping[str, Family] = {
    "Llama": Family("LlamaForCausalLM", "llama"),
    "Mistral": Family("MistralForCausalLM", "mistral"),
    "Qwen2": Family("Qwen2ForCausalLM", "qwen2"),
    "Qwen3": Family("Qwen3ForCausalLM", "qwen3"),
    "Gemma 2": Family("Gemma2ForCausalLM", "gemma2", _GEMMA, int8_embedding=False),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Phi-3": Family("Phi3ForCausalLM", "phi3", {"pad_token_id": 0}, merged=True),
}
"""The families by name."""

EXPERTS = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
)
"""A mixture of experts, in every decoder layer."""


def build_model(family: str | Family, lively: bool = False, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Return a random float32 model of a family.

    Args:
        family: a family, or its name in `FAMILIES`.
        lively: draw weights that are large enough for each one to matter to the logits, unlike transformers' own.
        seed: seed of the weights.
        config: changes to the tiny configuration.
    """
    entry = FAMILIES[family] if isinstance(family, str) else family
    torch.manual_seed(seed)
    sizes = {**SIZES, **entry.settings, **config}
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
    folder: Path,
    family: str | Family = "Qwen3",
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Path:
    """Write `build_model(family, **options)` to `folder` in about `shards` files; return the folder."""
    model = build_model(family, **options).to(dtype)
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    limit = max(*sizes, sum(sizes) // shards) if shards > 1 else "1GB"
    model.save_pretrained(folder, max_shard_size=limit)
    return folder
