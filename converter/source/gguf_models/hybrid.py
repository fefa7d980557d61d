"""Settings of models whose decoder layers are of several kinds."""

from collections import Counter
from typing import Any

from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.gguf_models.common import EMBEDDING, read_common, read_rest, too_old
from bwla_converter.source.gguf_models.experts import expert_width
from bwla_converter.source.gguf_models.keys import Keys, layers_of, read_floats
from bwla_converter.source.gguf_models.rope import read_rope
from bwla_kernels.errors import SourceError

UNROTATED = 1e29
"""Factors of RoPE frequencies from here on stand for dimensions that are not rotated; llama.cpp writes 1e30."""


def lfm2(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of LFM2: convolutions have no heads for keys and values, which tells them from attention."""
    per_layer = keys.need("attention.head_count_kv")
    layers = keys.need("block_count")
    heads = per_layer if isinstance(per_layer, list) else [per_layer] * layers
    common = read_common(file, keys, "lfm2", differing=("attention.head_count_kv",))
    # transformers' table calls the epsilon as in other models, which its class does not read.
    epsilon = common.pop("rms_norm_eps")
    return {
        **common,
        "num_key_value_heads": max(heads),
        "norm_eps": epsilon,
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "rope_parameters": read_rope(file, keys, 1_000_000.0),
        # The file has the adjusted width.
        "block_auto_adjust_ff_dim": False,
        # vLLM's class asks for these; llama.cpp has no other width than the hidden size.
        "conv_dim": common["hidden_size"],
        "block_dim": common["hidden_size"],
        "conv_bias": any(name.endswith("shortconv.conv.bias") for name in file.tensors),
    }


def qwen35(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of the language model of Qwen3.5, dense or with experts, as transformers reads them."""
    try:
        from transformers.integrations.gguf import get_gguf_config
    except ImportError:
        raise too_old(file) from None
    # transformers takes the size of the vocabulary from the number of tokens.
    metadata = keys.whole({"tokenizer.ggml.tokens": file.shape(EMBEDDING)[0]})
    try:
        settings: dict[str, Any] = get_gguf_config(metadata, tuple(file.tensors))
    except KeyError as cause:
        raise keys.missing(str(cause.args[0])) from None
    kinds = keys.get("attention.recurrent_layers")
    if kinds is not None:
        settings["layer_types"] = [
            "linear_attention" if linear else "full_attention"
            for linear in kinds[: settings["num_hidden_layers"]]
        ]
        del settings["full_attention_interval"]
    del settings["model_type"], settings["architectures"]
    # transformers leaves out the scaling.
    settings["rope_parameters"] |= read_rope(file, keys)
    return {**settings, **read_rest(file)}


def gemma4(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of the language model of Gemma 4.

    transformers' reader has the sizes of one model for all of them, apart from the widths.
    """
    layers = keys.need("block_count")
    slides = [bool(slide) for slide in keys.need("attention.sliding_window_pattern")]
    kv_heads, widths = (
        value if isinstance(value, list) else [value] * layers
        for value in (keys.need("attention.head_count_kv"), keys.need("feed_forward_length"))
    )
    local = _most([heads for heads, slide in zip(kv_heads, slides, strict=True) if slide])
    full = _most([heads for heads, slide in zip(kv_heads, slides, strict=True) if not slide])
    differing = ("attention.head_count_kv", "feed_forward_length")
    common = read_common(file, keys, "gemma4", partial=True, differing=differing)
    # The last layers may use the keys and values of earlier ones, whatever the file has of their own.
    shared = keys.get("attention.shared_kv_layers", 0)
    with_keys, with_values = (
        set(layers_of(file, f"attn_{kind}.weight", layers - shared)) for kind in ("k", "v")
    )
    settings = {
        **common,
        "head_dim": keys.get("attention.key_length_swa", common["head_dim"]),
        "global_head_dim": common["head_dim"],
        "num_key_value_heads": local or full,
        "num_global_key_value_heads": full if full != local else None,
        "attention_k_eq_v": bool(with_keys - with_values),
        "num_kv_shared_layers": shared,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": len(set(widths)) > 1,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_parameters": _gemma4_rope(file, keys),
        "hidden_size_per_layer_input": keys.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": common["vocab_size"],
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }
    if "blk.0.ffn_gate_inp.weight" in file.tensors:
        settings |= {
            "enable_moe_block": True,
            "num_experts": keys.need("expert_count"),
            "top_k_experts": keys.need("expert_used_count"),
            "moe_intermediate_size": expert_width(file),
        }
    return settings


def _gemma4_rope(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the RoPE of both kinds of layers: a factor of each frequency says whether full attention rotates it."""
    scaling = keys.get("rope.scaling.factor")
    if scaling is not None:
        raise SourceError(
            f"{file.path}: found a RoPE scaling of {scaling}, which Gemma 4 does not have: use another model"
        )
    rotated = 1.0
    if "rope_freqs.weight" in file.tensors:
        factors = read_floats(file, "rope_freqs.weight")
        used = [factor for factor in factors if factor < UNROTATED]
        if set(used) - {1.0}:
            raise SourceError(
                f"{file.path}: rope_freqs.weight: expected the factors 1 and 1e30, found others, which transformers "
                "cannot express: use another model"
            )
        rotated = len(used) / len(factors)
    full = {"rope_type": "proportional", "rope_theta": float(keys.get("rope.freq_base", 1_000_000.0))}
    local = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", 10_000.0))}
    return {"full_attention": {**full, "partial_rotary_factor": rotated}, "sliding_attention": local}


def _most(values: list[int]) -> int | None:
    """Return the most frequent value; None if there is none."""
    return Counter(values).most_common(1)[0][0] if values else None
