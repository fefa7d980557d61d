"""Cases: decoders whose layers are attention and a dense MLP."""

from benchmarks.coverage.case import TEXT, Case, derived, wide

_LAYER_TYPES = ["sliding_attention", "full_attention"]
_SLIDING = {"sliding_window": 8, "layer_types": _LAYER_TYPES}
_GEMMA = {"sliding_window": 8, "query_pre_attn_scalar": 32}
_GPT2 = {
    **{key: value for key, value in TEXT.items() if key.endswith("_id") or key == "vocab_size"},
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
}
_GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.125,
    "logits_scaling": 2.0,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_MPT = {
    **{key: value for key, value in TEXT.items() if key.endswith("_id") or key == "vocab_size"},
    "d_model": 64,
    "n_heads": 2,
    "n_layers": 2,
    "max_seq_len": 128,
}
_LAYER = "attention + MLP"
_PARALLEL = "attention & MLP"

_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": _LAYER_TYPES * 2,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "laurel_rank": 32,
    "vocab_size_per_layer_input": 256,
    "altup_num_inputs": 2,
    "intermediate_size": [128] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}

DENSE = (
    Case("llama", "Llama 3, Falcon 3, Yi, R1-Distill-Llama", "LlamaForCausalLM", "llama", _LAYER, wide()),
    Case("qwen2", "Qwen2.5, R1-Distill-Qwen", "Qwen2ForCausalLM", "qwen2", _LAYER, derived()),
    Case("qwen3", "Qwen3 0.6B to 32B", "Qwen3ForCausalLM", "qwen3", _LAYER, wide()),
    Case("mistral", "Mistral 7B, Nemo", "MistralForCausalLM", "mistral", _LAYER, wide()),
    Case("ministral3", "Ministral 3, text", "Ministral3ForCausalLM", "ministral3", _LAYER, wide()),
    Case("gemma", "Gemma", "GemmaForCausalLM", "gemma", _LAYER, wide()),
    Case("gemma2", "Gemma 2", "Gemma2ForCausalLM", "gemma2", _LAYER, wide(**_GEMMA)),
    Case(
        "gemma3_text",
        "Gemma 3 270M, 1B",
        "Gemma3ForCausalLM",
        "gemma3_text",
        _LAYER,
        wide(**{**_GEMMA, **_SLIDING}),
    ),
    Case(
        "gemma3n_text",
        "Gemma 3n E2B, E4B, text",
        "Gemma3nForCausalLM",
        "gemma3n_text",
        "attention + MLP + per-layer input | shared keys and values + MLP + per-layer input",
        wide(**_GEMMA3N),
    ),
    Case(
        "gemma4_text",
        "Gemma 4, text",
        "Gemma4ForCausalLM",
        "gemma4_text",
        "attention + MLP + per-layer input",
        wide(**_SLIDING, hidden_size_per_layer_input=32, vocab_size_per_layer_input=256),
    ),
    Case("phi", "Phi-1.5, Phi-2", "PhiForCausalLM", "phi", _PARALLEL, derived()),
    Case("phi3", "Phi-3, Phi-3.5, Phi-4", "Phi3ForCausalLM", "phi3", _LAYER, derived()),
    Case("smollm3", "SmolLM3 3B", "SmolLM3ForCausalLM", "smollm3", _LAYER, wide()),
    Case("granite", "Granite 3 dense", "GraniteForCausalLM", "granite", _LAYER, derived(**_GRANITE)),
    Case("olmo", "OLMo", "OlmoForCausalLM", "olmo", _LAYER, derived()),
    Case("olmo2", "OLMo 2", "Olmo2ForCausalLM", "olmo2", _LAYER, derived()),
    Case("olmo3", "OLMo 3", "Olmo3ForCausalLM", "olmo3", _LAYER, derived(**_SLIDING)),
    Case("glm", "GLM-4 9B (2024)", "GlmForCausalLM", "glm", _LAYER, wide()),
    Case("glm4", "GLM-4-0414 9B, 32B", "Glm4ForCausalLM", "glm4", _LAYER, wide()),
    Case("cohere", "Command R", "CohereForCausalLM", "cohere", _PARALLEL, derived()),
    Case("cohere2", "Command R7B, A", "Cohere2ForCausalLM", "cohere2", _PARALLEL, derived(**_SLIDING)),
    Case("stablelm", "StableLM 2", "StableLmForCausalLM", "stablelm", _LAYER, derived()),
    Case(
        "gpt_neox",
        "Pythia",
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _PARALLEL,
        {**TEXT, "num_attention_heads": 2},
    ),
    Case("ernie4_5", "ERNIE 4.5 0.3B", "Ernie4_5ForCausalLM", "ernie4_5", _LAYER, wide()),
    Case(
        "hunyuan_dense",
        "Hunyuan 0.5B to 7B",
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        _LAYER,
        wide(),
    ),
    Case("starcoder2", "StarCoder2", "Starcoder2ForCausalLM", "starcoder2", _LAYER, derived()),
    Case("seed_oss", "Seed-OSS 36B", "SeedOssForCausalLM", "seed_oss", _LAYER, wide()),
    Case("arcee", "AFM 4.5B", "ArceeForCausalLM", "arcee", _LAYER, wide()),
    Case("exaone4", "EXAONE 4", "Exaone4ForCausalLM", "exaone4", _LAYER, wide(**_SLIDING)),
    Case("nemotron", "Nemotron 4, Minitron", "NemotronForCausalLM", "nemotron", _LAYER, wide()),
    Case("apertus", "Apertus 8B, 70B", "ApertusForCausalLM", "apertus", _LAYER, wide()),
    Case(
        "falcon",
        "Falcon 7B to 180B",
        "FalconForCausalLM",
        "falcon",
        _PARALLEL,
        {
            **TEXT,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "new_decoder_architecture": True,
        },
    ),
    Case(
        "opt",
        "OPT",
        "OPTForCausalLM",
        "opt",
        _LAYER,
        {**TEXT, "num_attention_heads": 2, "ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    Case("vaultgemma", "VaultGemma", "VaultGemmaForCausalLM", "vaultgemma", _LAYER, wide(**_GEMMA)),
    Case("helium", "Helium 1", "HeliumForCausalLM", "helium", _LAYER, derived(head_dim=32)),
    Case("nanochat", "nanochat", "NanoChatForCausalLM", "nanochat", _LAYER, derived()),
    Case(
        "minicpm3",
        "MiniCPM3 4B",
        "MiniCPM3ForCausalLM",
        "minicpm3",
        "latent attention + MLP",
        {**derived(), "num_key_value_heads": 2, **_LATENT},
    ),
    Case(
        "gpt_bigcode",
        "StarCoder, SantaCoder",
        "GPTBigCodeForCausalLM",
        "gpt_bigcode",
        _LAYER,
        {**_GPT2, "n_inner": 128},
    ),
    Case("mpt", "MPT 7B, 30B", "MptForCausalLM", "mpt", _LAYER, _MPT),
    Case("bloom", "BLOOM", "BloomForCausalLM", "bloom", _LAYER, {**TEXT, "n_layer": 2, "n_head": 2}),
    Case(
        "gptj",
        "GPT-J 6B",
        "GPTJForCausalLM",
        "gptj",
        _PARALLEL,
        {**_GPT2, "n_inner": 128, "rotary_dim": 16},
    ),
    Case("gpt2", "GPT-2", "GPT2LMHeadModel", "gpt2", _LAYER, {**_GPT2, "n_inner": 128}),
)
