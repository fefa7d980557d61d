"""Tiny random models of any class of transformers, and sources made from them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from bwla_converter.calibration.layer_runner import DecoderLayer
from bwla_converter.source.model import Source, open_source
from torch import nn
from transformers import AutoConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


SLIDING = ["sliding_attention", "full_attention"]
GATED_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
SHARED_KV: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": SLIDING * 2,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 96,
}

KINDS: Mapping[str, dict[str, Any]] = {
    "biases": {"architecture": "Qwen2ForCausalLM", "model_type": "qwen2", "drop": ("head_dim",)},
    "soft caps": {
        "architecture": "Gemma2ForCausalLM",
        "model_type": "gemma2",
        "sliding_window": 8,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 0.5,
    },
    "two rotary tables": {
        "architecture": "Gemma3ForCausalLM",
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": SLIDING,
    },
    "merged linears": {"architecture": "Phi3ForCausalLM", "model_type": "phi3", "drop": ("head_dim",)},
    "layers without positions": {
        "architecture": "SmolLM3ForCausalLM",
        "model_type": "smollm3",
        "no_rope_layers": [1, 0],
        "drop": ("head_dim",),
    },
    "multipliers": {
        "architecture": "GraniteForCausalLM",
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.125,
        "logits_scaling": 2.0,
        "drop": ("head_dim",),
    },
    "norms after": {"architecture": "Olmo2ForCausalLM", "model_type": "olmo2", "drop": ("head_dim",)},
    "parallel branches": {
        "architecture": "Cohere2ForCausalLM",
        "model_type": "cohere2",
        "layer_types": SLIDING,
        "sliding_window": 8,
        "drop": ("head_dim",),
    },
    "other names": {
        "architecture": "GPTNeoXForCausalLM",
        "model_type": "gpt_neox",
        "drop": ("head_dim", "num_key_value_heads"),
    },
    "convolutions": {
        "architecture": "Lfm2ForCausalLM",
        "model_type": "lfm2",
        "layer_types": ["conv", "full_attention"],
        "block_ff_dim": 128,
        "block_auto_adjust_ff_dim": False,
        "drop": ("head_dim",),
    },
    "linear attention": {
        "architecture": "Qwen3_5ForCausalLM",
        "model_type": "qwen3_5_text",
        **GATED_DELTA_NET,
    },
    "Mamba beside attention": {
        "architecture": "FalconH1ForCausalLM",
        "model_type": "falcon_h1",
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "several streams, shared keys": {
        "architecture": "Gemma3nForCausalLM",
        "model_type": "gemma3n_text",
        **SHARED_KV,
        "laurel_rank": 32,
        "altup_num_inputs": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "shared keys by kind": {
        "architecture": "Gemma4ForCausalLM",
        "model_type": "gemma4_text",
        **SHARED_KV,
    },
    "experts": {
        "architecture": "Qwen3MoeForCausalLM",
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "stacked experts, and a shared one": {
        "architecture": "GraniteMoeSharedForCausalLM",
        "model_type": "granitemoeshared",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
        "drop": ("head_dim",),
    },
    "experts under other names": {
        "architecture": "MixtralForCausalLM",
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "transposed experts with biases": {  # down is square, so that its shape does not say how it is stored
        "architecture": "GptOssForCausalLM",
        "model_type": "gpt_oss",
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": SLIDING,
        "sliding_window": 8,
    },
    "learned positions, and a head that reads the inner model": {
        "architecture": "OPTForCausalLM",
        "model_type": "opt",
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "drop": ("intermediate_size", "num_key_value_heads", "head_dim"),
    },
    "a text class with the prefix of the class around it": {
        "architecture": "Llama4ForCausalLM",
        "model_type": "llama4_text",
        "intermediate_size_mlp": 128,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "a vision tower": {
        "architecture": "LlavaForConditionalGeneration",
        "model_type": "llava",
        "drop": ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "head_dim"),
        "text_config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 96,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "image_token_index": 95,
    },
    "a language model with its head inside another": {
        "architecture": "Llama4ForConditionalGeneration",
        "model_type": "llama4",
        "drop": tuple(SIZES),
        "text_config": {
            **SIZES,
            "model_type": "llama4_text",
            "intermediate_size_mlp": 128,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "pixel_shuffle_ratio": 0.5,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        "image_token_index": 95,
        "boi_token_index": 94,
        "eoi_token_index": 93,
    },
}
"""A class for each way in which models differ outside their decoder layers or call them differently."""


def build_any_model(
    architecture: str, model_type: str, drop: tuple[str, ...] = (), **config: Any
) -> PreTrainedModel:
    """Return a random float32 model of a class of transformers whose every weight matters to the logits.

    Args:
        architecture: name of the class.
        model_type: transformers' name of its configuration.
        drop: sizes that its configuration does not have.
        config: other settings.
    """
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key not in drop}
    settings = AutoConfig.for_model(model_type, **{**sizes, **config}, architectures=[architecture])
    model: PreTrainedModel = getattr(transformers, architecture)(settings).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "norm" not in name:
                parameter.normal_(std=0.1)
            if name.endswith("_proj_bias"):
                parameter.copy_(parameter.bfloat16())  # of experts, which are stored so
    return model.eval()


def write_any_model(model: PreTrainedModel, folder: Path) -> Source:
    """Write a model and return it as a source."""
    model.save_pretrained(folder)
    return open_source(str(folder))


def halve(layer: DecoderLayer, name: str) -> None:
    """Replace a linear by one with half its weight, as if it were quantized."""
    linear = layer.linear(name)
    assert isinstance(linear, nn.Linear)
    half = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    half.load_state_dict({key: value / 2 for key, value in linear.state_dict().items()})
    layer.replace(name, half)
