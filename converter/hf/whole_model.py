"""Models of transformers without weights: their class, their attention, their buffers."""

from typing import Any

import torch
import transformers
from bwla_converter.hf.attention import attention_implementation
from bwla_converter.source.observe.decoder import find_layers, models_around
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
    decoder = _around_layers(model)[-1]
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
    """Return the part of a model that the head reads, or the model itself if it has no head."""
    return bases_of(model)[0]


def bases_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the models inside a model whose outputs the head can read; the outermost first, the decoder last.

    They are those inside the innermost one with a head, since a multimodal model may contain a whole language model.
    """
    around = _around_layers(model)
    heads = [index for index, inner in enumerate(around) if inner.get_output_embeddings() is not None]
    return (around[heads[-1] + 1 :] if heads else around) or around[-1:]


def _around_layers(model: PreTrainedModel) -> list[PreTrainedModel]:
    return models_around(model, find_layers(model, model.name_or_path or type(model).__name__)[1])


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that are not stored, such as rotary frequencies, as transformers does for missing tensors."""
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key in module._non_persistent_buffers_set:
                module.register_buffer(key, torch.empty_like(buffer, device=device), persistent=False)
                module._is_hf_initialized = False
    model.initialize_weights()
