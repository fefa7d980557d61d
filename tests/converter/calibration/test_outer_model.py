"""Layers of any class, run one at a time, compute the whole model's hidden states and logits to the last bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from any_model import build_any_model, write_any_model
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.layer_runner import LayerRunner
from bwla_converter.calibration.samples import Samples
from bwla_converter.hf.whole_model import choose_attention
from bwla_converter.source.model import Source
from torch import Tensor
from transformers import PreTrainedModel

CPU = torch.device("cpu")
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
}
"""A class for each way in which models differ outside their decoder layers or call them differently."""


def token_ids() -> Tensor:
    return torch.randint(1, 90, (3, 20), generator=torch.Generator().manual_seed(0))


def make(kind: str, folder: Path) -> tuple[PreTrainedModel, Source]:
    model = build_any_model(**KINDS[kind])
    choose_attention(model, CPU)
    return model, write_any_model(model, folder / "model")


def outputs_of_blocks(model: PreTrainedModel, name: str) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of every decoder layer, and the logits."""
    outputs: list[Tensor] = []
    for block in model.get_submodule(name).children():
        block.register_forward_hook(
            lambda _, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    logits: Tensor = model(token_ids(), use_cache=False).logits
    return outputs, logits


def whole(samples: Samples) -> Tensor:
    return torch.cat(list(samples.hidden.split(3)))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_layer_after_layer_is_the_model_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    model, source = make(kind, tmp_path)
    runner, store = LayerRunner(source, CPU), ActivationStore()
    expected, logits = outputs_of_blocks(model, runner.outer.blocks_name)
    samples = Samples.embedded(runner, store, token_ids(), 3)
    for index in range(source.num_layers):
        layer = runner.layer(index, source.read(source.names_of_layer(index)))
        samples = samples.run(layer, store, 3)
        found = whole(samples).movedim(0, runner.outer.conventions.sample_axis)
        assert torch.equal(found, expected[index])
    normed = runner.outer.normed(whole(samples))
    assert torch.equal(runner.outer.logits(normed.flatten(0, 1)).view_as(logits), logits)
    assert runner.outer.vocabulary == logits.shape[-1] == 96
