"""Cases: mixtures of experts."""

from benchmarks.coverage.case import Case, derived, wide

_LAYER = "attention + experts"
_MLA_LAYERS = "MLA + MLP | MLA + experts"

LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_conv_kernel_dim": 4,
}
_MLA = {
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SHARED = {"shared_expert_intermediate_size": 64}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_LLAMA4 = {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 128,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 128,
}
_KIMI = {
    **_MLA,
    "q_lora_rank": None,
    "n_shared_experts": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "linear_head_dim": 32,
    "linear_num_heads": 2,
    "linear_conv_kernel_dim": 4,
    "mlp_layer_types": ["dense", "sparse"],
    "layer_types": LINEAR_ATTENTION["layer_types"],
}
_ERNIE = {
    "moe_num_experts": 4,
    "moe_k": 2,
    "moe_intermediate_size": 64,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
}
_LFM2 = {
    "layer_types": ["conv", "full_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_dense_layers": 1,
}


def _case(name: str, models: str, architecture: str, blocks: str, settings: dict[str, object]) -> Case:
    """Return a case whose name is also transformers' name of the configuration."""
    return Case(name, models, architecture, name, blocks, settings, group="experts")


EXPERTS = (
    _case("mixtral", "Mixtral 8x7B, 8x22B", "MixtralForCausalLM", _LAYER, wide(**_LOCAL)),
    _case(
        "qwen2_moe",
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        "Qwen2MoeForCausalLM",
        "attention + experts & shared expert",
        derived(**_QWEN, **_SHARED, decoder_sparse_step=1),
    ),
    _case("qwen3_moe", "Qwen3-30B-A3B, 235B, Coder", "Qwen3MoeForCausalLM", _LAYER, wide(**_QWEN)),
    Case(
        "qwen3_next",
        "Qwen3-Next 80B-A3B",
        "Qwen3NextForCausalLM",
        "qwen3_next",
        "linear attention + experts | attention + experts",
        wide(**_QWEN, **LINEAR_ATTENTION, **_SHARED),
        group="experts",
        dtype="bfloat16",
    ),
    Case(
        "qwen3_5_moe_text",
        "Qwen3.5, 3.6 35B-A3B, text",
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        "linear attention + experts | attention + experts",
        wide(**_QWEN, **LINEAR_ATTENTION, **_SHARED),
        group="experts",
        dtype="bfloat16",
    ),
    _case("gpt_oss", "gpt-oss 20B, 120B", "GptOssForCausalLM", _LAYER, wide(**_LOCAL, **_SLIDING)),
    _case(
        "deepseek_v2",
        "DeepSeek V2, V2-Lite",
        "DeepseekV2ForCausalLM",
        _MLA_LAYERS,
        derived(**{**_MLA, **_ROUTED, "topk_method": "greedy"}),
    ),
    _case(
        "deepseek_v3",
        "DeepSeek V3, R1, V3.1, Kimi K2",
        "DeepseekV3ForCausalLM",
        _MLA_LAYERS,
        derived(**{**_MLA, **_ROUTED, **_SIGMOID}),
    ),
    _case(
        "glm4_moe_lite",
        "GLM-4.7-Flash",
        "Glm4MoeLiteForCausalLM",
        _MLA_LAYERS,
        derived(**{**_MLA, **_ROUTED}, mlp_layer_types=["dense", "sparse"]),
    ),
    _case(
        "glm4_moe",
        "GLM-4.5, 4.6, 4.7",
        "Glm4MoeForCausalLM",
        "attention + MLP | attention + experts",
        wide(**_ROUTED),
    ),
    _case(
        "ernie4_5_moe",
        "ERNIE 4.5 21B-A3B, 300B-A47B",
        "Ernie4_5_MoeForCausalLM",
        "attention + MLP | attention + experts",
        derived(**_ERNIE),
    ),
    _case(
        "hunyuan_v1_moe",
        "Hunyuan A13B",
        "HunYuanMoEV1ForCausalLM",
        _LAYER,
        wide(num_experts=4, moe_topk=2, num_shared_expert=1),
    ),
    _case("olmoe", "OLMoE 1B-7B", "OlmoeForCausalLM", _LAYER, derived(num_experts=4, num_experts_per_tok=2)),
    _case(
        "flex_olmo", "FlexOlmo", "FlexOlmoForCausalLM", _LAYER, derived(num_experts=4, num_experts_per_tok=2)
    ),
    _case("granitemoe", "Granite 3 MoE", "GraniteMoeForCausalLM", _LAYER, derived(**_LOCAL)),
    _case(
        "granitemoeshared",
        "Granite MoE with shared experts",
        "GraniteMoeSharedForCausalLM",
        "attention + experts & shared expert",
        derived(**_LOCAL, shared_intermediate_size=64),
    ),
    _case(
        "dots1",
        "dots.llm1",
        "Dots1ForCausalLM",
        "attention + MLP | attention + experts & shared expert",
        wide(**_ROUTED),
    ),
    _case(
        "exaone_moe",
        "K-EXAONE",
        "ExaoneMoeForCausalLM",
        "attention + MLP | attention + experts & shared expert",
        wide(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            n_group=1,
            topk_group=1,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    _case("lfm2_moe", "LFM2 8B-A1B", "Lfm2MoeForCausalLM", "convolution | attention", derived(**_LFM2)),
    _case("llama4_text", "Llama 4 Scout, Maverick, text", "Llama4ForCausalLM", _LAYER, wide(**_LLAMA4)),
    _case(
        "minimax_m2",
        "MiniMax M2",
        "MiniMaxM2ForCausalLM",
        _LAYER,
        wide(**_LOCAL, rotary_dim=32, scoring_func="sigmoid", use_routing_bias=True),
    ),
    _case(
        "kimi_linear",
        "Kimi Linear 48B-A3B",
        "KimiLinearForCausalLM",
        "linear attention + MLP | MLA + experts",
        derived(**_KIMI),
    ),
    _case("phimoe", "Phi-3.5-MoE", "PhimoeForCausalLM", _LAYER, derived(**_LOCAL)),
)
