"""Tiny GGUF files, written with the rules of llama.cpp's converter."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common.tiny_models import build_model

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""llama.cpp's names of the architectures, by transformers' model type."""

Changes = Mapping[str, np.ndarray[Any, Any] | None]
"""Tensors to add to a file or to replace in it, by llama.cpp's names; None leaves one out."""


def tiny(family: str, **config: Any) -> PreTrainedModel:
    """Return a tiny model of a family whose weights are bfloat16 values, in float32."""
    model = build_model(family, lively=True, **config)
    with torch.no_grad():
        for parameter in model.parameters():  # and not the buffers, such as the frequencies of RoPE
            parameter.copy_(parameter.bfloat16())
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    quantization: str = "F32",
    changes: Changes | None = None,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    parts: int = 1,
) -> Path:
    """Write a model as a GGUF file.

    Args:
        path: the file, or the first part's name for several parts.
        model: a model of one of the supported families.
        quantization: type of the linears and the embedding.
        changes: tensors that differ from the model's.
        extra: adds further metadata.
        parts: number of parts.

    Returns: the file, the first one of several parts.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    tensors = {**named_tensors(model), **rope_tensors(model.config)}
    stored = {name: value for name, value in (tensors | dict(changes or {})).items() if value is not None}
    limit = -(-len(stored) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=limit)
    add_settings(writer, model.config)
    extra(writer)
    for name, value in stored.items():
        quantize = value.ndim == 2 and quantization != "F32"
        kind = gguf.GGMLQuantizationType[quantization if quantize else "F32"]
        writer.add_tensor(name, quantized(value, kind), raw_dtype=kind)
    finish(writer)
    return path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf") if parts > 1 else path


def quantized(value: np.ndarray[Any, Any], kind: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Quantize a tensor as llama.cpp does; gguf lacks Q1_0 (ggml: quantize_row_q1_0_ref in ggml-quants.c)."""
    if kind != gguf.GGMLQuantizationType.Q1_0:
        stored: np.ndarray[Any, Any] = gguf.quants.quantize(value, kind)
        return stored
    blocks = value.astype(np.float32).reshape(len(value), -1, 128)
    scale = np.abs(blocks).mean(-1, keepdims=True).astype(np.float16).view(np.uint8)
    bits = np.packbits(blocks >= 0, axis=-1, bitorder="little")
    rows: np.ndarray[Any, Any] = np.concatenate([scale, bits], -1).reshape(len(value), -1)
    return rows


def finish(writer: gguf.GGUFWriter) -> None:
    """Write a file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named_tensors(model: PreTrainedModel) -> dict[str, np.ndarray[Any, Any] | None]:
    """Return the tensors of a model as llama.cpp's converter stores them."""
    architecture = ARCHITECTURES[model.config.model_type]
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)
    tensors: dict[str, np.ndarray[Any, Any] | None] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = tensor.float()
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if architecture == "llama" and ".q_proj." in name:
            value = permute(value, model.config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            value = permute(value, model.config.num_key_value_heads)
        module, _, kind = name.rpartition(".")
        tensors[f"{name_map.get_name(module)}.{kind}"] = value.numpy()
    return tensors


def permute(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q_proj or k_proj as llama.cpp does."""
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape).contiguous()


def rope_tensors(config: Any) -> dict[str, np.ndarray[Any, Any] | None]:
    """Return the tensors that describe Llama 3's and Phi-3's RoPE scaling."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        wavelengths = 2 * torch.pi * rope["rope_theta"] ** exponents
        periods, low, high = 8192 / wavelengths, rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = ((periods - low) / (high - low)).clamp(0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).numpy()}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], dtype=np.float32)
            for kind in ("long", "short")
        }
    return {}


def add_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    """Add the metadata that llama.cpp's converter writes for a configuration."""
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    architecture = ARCHITECTURES[config.model_type]
    if getattr(config, "head_dim", None):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    if architecture != "gemma2":  # whose base is always the default
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if architecture == "gemma3":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_array("gemma3.attention.sliding_window_pattern", slides)
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
