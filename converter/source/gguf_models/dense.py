"""Settings of dense models with one kind of decoder layer.

transformers' reader leaves out what its table does not have: the head size of Qwen3, RoPE scaling, the two RoPE bases
and the sliding windows of Gemma 3, the softcapping of Gemma 2, partial rotation, the kind of Falcon. Such a model would
load without an error and compute something else.
"""

from typing import Any

from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.gguf_models.common import read_common
from bwla_converter.source.gguf_models.keys import Keys, read_floats
from bwla_converter.source.gguf_models.rope import head_dim_of, read_rope

GEMMA_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Number of layers by which llama.cpp recognizes the 27B models, whose attention is scaled by hidden_size / heads."""

GEMMA3_PATTERN = 6
"""Every sixth layer of Gemma 3 has full attention, unless the file says otherwise."""


def llama(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Llama, and of Mistral, whose files have the same name."""
    return {
        **read_common(file, keys, "llama"),
        "rope_parameters": read_rope(file, keys),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def qwen2(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Qwen2 and Qwen2.5."""
    return {**read_common(file, keys, "qwen2"), "rope_parameters": read_rope(file, keys)}


def qwen3(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Qwen3."""
    return {
        **read_common(file, keys, "qwen3"),
        "rope_parameters": read_rope(file, keys),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def gemma2(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Gemma 2."""
    return {
        **_gemma(file, keys),
        "rope_parameters": read_rope(file, keys),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "tie_word_embeddings": True,
    }


def gemma3(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of the language model of Gemma 3."""
    layers = keys.need("block_count")
    pattern = keys.get("attention.sliding_window_pattern", GEMMA3_PATTERN)
    if isinstance(pattern, list):
        slides = [bool(slide) for slide in pattern]
    else:
        slides = [(index + 1) % pattern != 0 for index in range(layers)]
    local = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", 10_000.0))}
    return {
        **_gemma(file, keys),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_parameters": {"sliding_attention": local, "full_attention": read_rope(file, keys, 1_000_000.0)},
    }


def _gemma(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Gemma 2 and 3."""
    common = read_common(file, keys, file.architecture)
    large = keys.need("block_count") == GEMMA_LAYERS_OF_27B[file.architecture]
    scalar = (
        keys.need("embedding_length") // keys.need("attention.head_count") if large else head_dim_of(keys)
    )
    return {
        **common,
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.need("attention.sliding_window"),
        "final_logit_softcapping": keys.get(
            "final_logit_softcapping", 30.0 if file.architecture == "gemma2" else None
        ),
    }


def phi3(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Phi-3, Phi-3.5 and Phi-4."""
    common = read_common(file, keys, "phi3", partial=True)
    original = keys.get("rope.scaling.original_context_length", keys.need("context_length"))
    rope = _partial_rope(file, keys)
    if "rope_factors_long.weight" in file.tensors:
        # Read without effect: transformers computes it from the contexts, as llama.cpp has done.
        keys.get("rope.scaling.attn_factor")
        factors = {
            f"{kind}_factor": read_floats(file, f"rope_factors_{kind}.weight") for kind in ("long", "short")
        }
        rope = {**rope, "rope_type": "longrope", "original_max_position_embeddings": original, **factors}
    return {
        **common,
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        # 0 stands for no window, in Phi-4.
        "sliding_window": keys.get("attention.sliding_window") or None,
    }


def _partial_rope(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return `rope_parameters` with the part of each head that is rotated."""
    head_dim = head_dim_of(keys)
    rotated = keys.get("rope.dimension_count", head_dim)
    return {**read_rope(file, keys), "partial_rotary_factor": rotated / head_dim}


def starcoder2(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of StarCoder2. The files do not record its sliding window, which llama.cpp does not have."""
    return {
        **read_common(file, keys, "starcoder2"),
        "rope_parameters": read_rope(file, keys),
        "use_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def stablelm(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of StableLM."""
    return {
        **read_common(file, keys, "stablelm", partial=True),
        "rope_parameters": _partial_rope(file, keys),
        "use_qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in file.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
    }


def nemotron(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Nemotron 4 and Minitron."""
    common = read_common(file, keys, "nemotron", partial=True)
    rope = _partial_rope(file, keys)
    # llama.cpp's converter computes the rotated part from hidden_size / heads, also where heads have another size.
    width, heads = keys.need("embedding_length"), keys.need("attention.head_count")
    if keys.get("rope.dimension_count") == width // 2 // heads:
        rope["partial_rotary_factor"] = 0.5
    return {
        **common,
        "rope_parameters": rope,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def falcon(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Falcon. Its three kinds differ in their norms and in the heads of keys and values."""
    common = read_common(file, keys, "falcon")
    heads = common["num_attention_heads"]
    # The class computes the head size, and calls two settings otherwise than transformers' table.
    head_dim, kv_heads = common.pop("head_dim"), common.pop("num_key_value_heads")
    epsilon = common.pop("rms_norm_eps")
    norms = 2 if "blk.0.attn_norm_2.weight" in file.tensors else 1
    if "blk.0.attn_qkv.weight" in file.tensors:
        # Some configurations of the first Falcon state as many heads for keys as for queries, and have one.
        kv_heads = (file.shape("blk.0.attn_qkv.weight")[0] // head_dim - heads) // 2
    multi_query = kv_heads == 1 and norms == 1
    return {
        **common,
        "rope_parameters": read_rope(file, keys),
        "layer_norm_epsilon": epsilon,
        "num_kv_heads": kv_heads,
        "multi_query": multi_query,
        "new_decoder_architecture": not multi_query,
        "num_ln_in_parallel_attn": None if multi_query else norms,
        "ffn_hidden_size": keys.need("feed_forward_length"),
        "bias": "blk.0.attn_qkv.bias" in file.tensors,
    }


def bloom(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of BLOOM, whose positions are biases of the attention (ALiBi)."""
    common = read_common(file, keys, "bloom")
    keys.get("feed_forward_length")  # always four times the hidden size
    keys.get("attention.head_count_kv")
    del common["head_dim"]
    context = common.pop("max_position_embeddings")
    return {**common, "seq_length": context}
