"""Models of transformers without weights: their class, their attention, their buffers."""

from typing import Any

import torch
import transformers
from bwla_converter.hf.attention import attention_implementation
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


def build_without_weights(architecture: str, config: Any) -> PreTrainedModel:
    """Build the class that config.json names on the meta device; AutoModelForCausalLM's where there is none."""
    named = getattr(transformers, architecture, None)
    with torch.device("meta"):
        model: PreTrainedModel = named(config) if named else AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("eager")  # torch's grouped products take only bfloat16 on a CPU
    return model


def choose_attention(model: PreTrainedModel, device: torch.device) -> str:
    """Choose the attention implementation of the decoder and return its name."""
    decoder = model.get_decoder()
    config = decoder.config.get_text_config()
    # transformers' other attention implementations ignore the soft cap (Gemma 2).
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    name = "eager" if capped else attention_implementation(device)
    try:
        if name != "eager":
            decoder.set_attn_implementation(
                "sdpa"
            )  # raises where the class computes something else (gpt-oss)
        decoder.set_attn_implementation(name)
    except ValueError:
        name = "eager"
        decoder.set_attn_implementation(name)
    return name


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a model that the head reads: the child that contains the decoder, or the model itself.

    It is not always `model.base_model`: Llama 4's text class has the prefix of the class that contains it.
    """
    decoder = model.get_decoder()
    found: PreTrainedModel = next((child for child in model.children() if _is_inside(decoder, child)), model)
    return found


def _is_inside(module: nn.Module, parent: nn.Module) -> bool:
    return any(module is other for other in parent.modules())


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that are not stored, such as rotary frequencies, as transformers does for missing tensors."""
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key in module._non_persistent_buffers_set:
                module.register_buffer(key, torch.empty_like(buffer, device=device), persistent=False)
                module._is_hf_initialized = False
    model.initialize_weights()
