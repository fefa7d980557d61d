"""What llama.cpp's converter makes of settings: GGUF keys, without the architecture's prefix, with their values."""

from typing import Any

Keys = dict[str, Any]


def common_keys(config: Any) -> Keys:
    """Return the settings that llama.cpp's converter takes from every config.json that has them."""
    settings = config.to_dict()
    rope = settings.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    names = {
        "block_count": ("num_hidden_layers", "n_layer"),
        "context_length": ("max_position_embeddings",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size",),
        "attention.head_count": ("num_attention_heads", "n_head"),
        "attention.head_count_kv": ("num_key_value_heads", "n_head"),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
        "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok", "top_k_experts"),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
    }
    found = {
        key: next((settings[name] for name in choices if settings.get(name) is not None), None)
        for key, choices in names.items()
    }
    if config.model_type not in ("stablelm", "falcon", "bloom"):
        found["rope.freq_base"] = rope.get("rope_theta")
    return {key: value for key, value in found.items() if value is not None}


def falcon_keys(config: Any) -> Keys:
    """Return Falcon's own settings."""
    return {
        "context_length": 2048,
        "tensor_data_layout": "jploski",
        "feed_forward_length": 4 * config.hidden_size,
        "attention.head_count_kv": config.num_kv_heads,
    }


def partial_keys(config: Any) -> Keys:
    """Return the part of each head that is rotated."""
    head_dim = config.hidden_size // config.num_attention_heads
    return {"rope.dimension_count": int(config.rope_parameters["partial_rotary_factor"] * head_dim)}


def gpt_oss_keys(config: Any) -> Keys:
    """Return gpt-oss's own settings."""
    rope = config.rope_parameters
    return {
        "attention.sliding_window": config.sliding_window,
        "expert_feed_forward_length": config.intermediate_size,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": rope["beta_fast"],
        "rope.scaling.yarn_beta_slow": rope["beta_slow"],
    }


def lfm2_keys(config: Any) -> Keys:
    """Return LFM2's own settings."""
    heads = [config.num_key_value_heads if kind != "conv" else 0 for kind in config.layer_types]
    return {
        "attention.head_count_kv": heads,
        "vocab_size": config.vocab_size,
        "shortconv.l_cache": config.conv_L_cache,
    }


def expert_keys(config: Any) -> Keys:
    """Return the widths of experts."""
    keys = {"expert_feed_forward_length": config.moe_intermediate_size}
    if hasattr(config, "shared_expert_intermediate_size"):
        keys["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return keys


def minimax_keys(config: Any) -> Keys:
    """Return MiniMax M2's own settings."""
    return {
        "rope.dimension_count": config.rotary_dim,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_gating_func": 2,
    }


def qwen35_keys(config: Any) -> Keys:
    """Return Qwen3.5's own settings."""
    rope = config.rope_parameters
    keys = {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
        "full_attention_interval": 2,
        "rope.dimension_count": int(config.head_dim * rope["partial_rotary_factor"]),
        "rope.dimension_sections": [*rope["mrope_section"], 0],
    }
    return keys | (expert_keys(config) if hasattr(config, "moe_intermediate_size") else {})


def gemma4_keys(config: Any) -> Keys:
    """Return Gemma 4's own settings."""
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    full, local = (config.per_layer_config[slides.index(slide)] for slide in (False, True))
    shared = [index >= len(slides) - config.num_kv_shared_layers for index in range(len(slides))]
    keys = {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": local.head_dim,
        "attention.value_length_swa": local.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": local.head_dim,
        "rope.freq_base_swa": config.rope_parameters["sliding_attention"]["rope_theta"],
    }
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    if config.use_double_wide_mlp:
        keys["feed_forward_length"] = [config.intermediate_size * (1 + double) for double in shared]
    if full.num_key_value_heads != local.num_key_value_heads:
        heads = (full.num_key_value_heads, local.num_key_value_heads)
        keys["attention.head_count_kv"] = [heads[slide] for slide in slides]
    if config.enable_moe_block:
        keys |= {"expert_feed_forward_length": config.moe_intermediate_size}
    return keys
