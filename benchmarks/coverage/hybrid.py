"""Cases: decoders that mix attention with convolutions, linear attention or state-space layers."""

from benchmarks.coverage.case import TEXT, Case, derived, wide
from benchmarks.coverage.experts import LINEAR_ATTENTION

_LFM2 = {
    "layer_types": ["conv", "full_attention"],
    "conv_dim": 64,
    "conv_dim_out": 64,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_mlp_init_scale": 1.0,
    "block_norm_eps": 1e-5,
    "block_auto_adjust_ff_dim": False,
}
_FALCON_H1 = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
_NEMOTRON_H = {
    "layers_block_type": ["mamba", "attention", "mlp", "moe"],
    "num_hidden_layers": 4,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 1,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
}
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_d_state": 16,
    "mamba_dt_rank": 32,
}
_GRANITE4 = {
    "layer_types": ["mamba", "attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}

_MAMBA_2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
_MAMBA2_MODEL = {
    **{key: value for key, value in TEXT.items() if key.endswith("_id") or key == "vocab_size"},
    "hidden_size": 64,
    "num_heads": 4,
    "head_dim": 32,
    "state_size": 16,
    "num_hidden_layers": 2,
    "n_groups": 1,
    "chunk_size": 8,
}
_OLMO_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}

HYBRID = (
    Case(
        "bamba",
        "Bamba 9B",
        "BambaForCausalLM",
        "bamba",
        "Mamba-2 + MLP | attention + MLP",
        derived(attn_layer_indices=[1], **_MAMBA_2),
        group="hybrid",
    ),
    Case(
        "mamba2",
        "Mamba-2, Codestral Mamba",
        "Mamba2ForCausalLM",
        "mamba2",
        "Mamba-2",
        _MAMBA2_MODEL,
        group="hybrid",
    ),
    Case(
        "olmo_hybrid",
        "OLMo Hybrid 7B",
        "OlmoHybridForCausalLM",
        "olmo_hybrid",
        "linear attention + MLP | attention + MLP",
        derived(**_OLMO_HYBRID),
        group="hybrid",
    ),
    Case(
        "qwen3_5_text",
        "Qwen3.5, 3.6 dense, text",
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        "linear attention + MLP | attention + MLP",
        wide(**LINEAR_ATTENTION),
        group="hybrid",
        dtype="bfloat16",
    ),
    Case(
        "lfm2",
        "LFM2 350M to 2.6B",
        "Lfm2ForCausalLM",
        "lfm2",
        "convolution + MLP | attention + MLP",
        derived(**_LFM2),
        group="hybrid",
    ),
    Case(
        "falcon_h1",
        "Falcon-H1",
        "FalconH1ForCausalLM",
        "falcon_h1",
        "Mamba-2 & attention + MLP",
        wide(**_FALCON_H1),
        group="hybrid",
    ),
    Case(
        "nemotron_h",
        "Nemotron Nano 2, 3, Super",
        "NemotronHForCausalLM",
        "nemotron_h",
        "Mamba-2 | attention | MLP | experts",
        wide(**_NEMOTRON_H),
        group="hybrid",
    ),
    Case(
        "jamba",
        "Jamba",
        "JambaForCausalLM",
        "jamba",
        "Mamba-1 + MLP | attention + experts",
        derived(**_JAMBA),
        group="hybrid",
    ),
    Case(
        "granite4_hybrid",
        "Granite 4 H-Tiny, H-Small",
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        "Mamba-2 + experts & shared expert | attention + experts & shared expert",
        derived(**_GRANITE4),
        group="hybrid",
    ),
)
