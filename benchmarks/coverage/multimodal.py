"""Cases: multimodal models, of which the decoder is converted, and embedding models."""

from typing import Any

from benchmarks.coverage.case import Case, Group, derived, wide
from benchmarks.coverage.experts import LINEAR_ATTENTION

_LAYER = "attention + MLP"
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
}
_QWEN_TOKENS = {
    "image_token_id": 250,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_GEMMA4_TOKENS = {
    "image_token_id": 250,
    "video_token_id": 251,
    "audio_token_id": 252,
    "boi_token_id": 253,
    "eoi_token_id": 254,
}
_LLAMA4_VISION = {
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
}


def _model(text: dict[str, Any], vision: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return the settings of a model with a decoder and a vision tower."""
    return {"text_config": text, "vision_config": vision, **settings}


_MODELS = (
    (
        "qwen2_5_vl",
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        _LAYER,
        _model(
            derived(**_MROPE, model_type="qwen2_5_vl_text"),
            {**_QWEN_VISION, "fullatt_block_indexes": [0]},
            **_QWEN_TOKENS,
        ),
    ),
    (
        "qwen3_vl",
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        _LAYER,
        _model(
            wide(**_MROPE, model_type="qwen3_vl_text"),
            {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_QWEN_TOKENS,
        ),
    ),
    (
        "qwen3_5",
        "Qwen3.5, 3.6 dense, as published",
        "Qwen3_5ForConditionalGeneration",
        "linear attention + MLP | attention + MLP",
        _model(
            wide(**LINEAR_ATTENTION, model_type="qwen3_5_text"),
            {**_QWEN_VISION, "num_position_embeddings": 16},
            **_QWEN_TOKENS,
        ),
    ),
    (
        "gemma3",
        "Gemma 3 4B to 27B",
        "Gemma3ForConditionalGeneration",
        _LAYER,
        _model(
            wide(**_SLIDING, query_pre_attn_scalar=32, model_type="gemma3_text"),
            {**_VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=250,
            boi_token_index=251,
            eoi_token_index=252,
        ),
    ),
    (
        "gemma4",
        "Gemma 4, as published",
        "Gemma4ForConditionalGeneration",
        "attention + MLP + per-layer input",
        _model(
            wide(
                **_SLIDING,
                hidden_size_per_layer_input=32,
                vocab_size_per_layer_input=256,
                model_type="gemma4_text",
            ),
            _GEMMA4_VISION,
            audio_config=None,
            **_GEMMA4_TOKENS,
        ),
    ),
    (
        "qwen2_vl",
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        _LAYER,
        _model(
            derived(**_MROPE, model_type="qwen2_vl_text"),
            {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "patch_size": 14},
            **_QWEN_TOKENS,
        ),
    ),
    (
        "internvl",
        "InternVL 3, 3.5",
        "InternVLForConditionalGeneration",
        _LAYER,
        _model(
            derived(model_type="qwen2"),
            {**_VISION, "model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
            image_token_id=250,
        ),
    ),
    (
        "smolvlm",
        "SmolVLM, SmolVLM2",
        "SmolVLMForConditionalGeneration",
        _LAYER,
        _model(
            wide(model_type="llama"),
            {**_VISION, "model_type": "smolvlm_vision"},
            image_token_id=250,
            scale_factor=2,
        ),
    ),
    (
        "paligemma",
        "PaliGemma 1, 2",
        "PaliGemmaForConditionalGeneration",
        _LAYER,
        _model(
            wide(model_type="gemma"),
            {**_VISION, "model_type": "siglip_vision_model", "projection_dim": 64},
            image_token_index=250,
            projection_dim=64,
        ),
    ),
    (
        "llama4",
        "Llama 4 Scout, Maverick, as published",
        "Llama4ForConditionalGeneration",
        "attention + experts & shared expert",
        _model(
            wide(
                intermediate_size_mlp=128,
                num_local_experts=4,
                num_experts_per_tok=1,
                model_type="llama4_text",
            ),
            _LLAMA4_VISION,
            image_token_index=250,
            boi_token_index=251,
            eoi_token_index=252,
        ),
    ),
    (
        "mistral3",
        "Mistral Small 3, Ministral 3, as published",
        "Mistral3ForConditionalGeneration",
        _LAYER,
        _model(
            wide(model_type="ministral3", rope_parameters=_YARN),
            {**_VISION, "head_dim": 32, "model_type": "pixtral"},
            image_token_index=250,
        ),
    ),
    (
        "idefics3",
        "Idefics 3",
        "Idefics3ForConditionalGeneration",
        _LAYER,
        _model(
            wide(model_type="llama"),
            {**_VISION, "model_type": "idefics3_vision"},
            image_token_id=250,
            pad_token_id=0,
            scale_factor=2,
        ),
    ),
    (
        "blip-2",
        "BLIP-2 with OPT",
        "Blip2ForConditionalGeneration",
        _LAYER,
        _model(
            {**derived(ffn_dim=128, word_embed_proj_dim=64), "model_type": "opt"},
            {**_VISION, "model_type": "blip_2_vision_model"},
            qformer_config={
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "encoder_hidden_size": 64,
                "vocab_size": 256,
                "model_type": "blip_2_qformer",
            },
            num_query_tokens=4,
            image_token_index=250,
        ),
    ),
    (
        "qwen3_vl_moe",
        "Qwen3-VL 30B-A3B, 235B",
        "Qwen3VLMoeForConditionalGeneration",
        "attention + experts",
        _model(
            wide(
                **_MROPE,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=96,  # not 64, since transformers tells by the shape what is transposed
                norm_topk_prob=True,  # as published; vLLM's class asks for it
                model_type="qwen3_vl_moe_text",
            ),
            {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **_QWEN_TOKENS,
        ),
    ),
    (
        "llava",
        "LLaVA 1.5",
        "LlavaForConditionalGeneration",
        _LAYER,
        _model(
            wide(model_type="llama"), {**_VISION, "model_type": "clip_vision_model"}, image_token_index=250
        ),
    ),
)

_GROUP: Group = "multimodal"
_BFLOAT16 = ("qwen3_5",)
_TRANSPOSED = {"qwen3_vl_moe": ("experts.gate_up_proj", "experts.down_proj")}

MULTIMODAL = tuple(
    Case(
        name,
        models,
        architecture,
        name,
        blocks,
        settings,
        group=_GROUP,
        dtype="bfloat16" if name in _BFLOAT16 else "float32",
        transposed=_TRANSPOSED.get(name, ()),
    )
    for name, models, architecture, blocks, settings in _MODELS
)

_ENCODER = {key: value for key, value in derived().items() if key not in ("num_key_value_heads", "head_dim")}

EMBEDDING = (
    Case(
        "qwen3_embedding",
        "Qwen3-Embedding",
        "Qwen3ForCausalLM",
        "qwen3",
        _LAYER,
        wide(tie_word_embeddings=True),
        group="embedding",
        bare=True,
    ),
    Case(
        "gemma3_embed",
        "EmbeddingGemma",
        "Gemma3TextModel",
        "gemma3_text",
        _LAYER,
        wide(**_SLIDING, query_pre_attn_scalar=32),
        group="embedding",
        bare=True,
    ),
    Case(
        "embedding_gemma2",
        "EmbeddingGemma 2, heads of one width",
        "EmbeddingGemma2Model",
        "embedding_gemma2",
        "attention + MLP + per-layer input",
        {
            "text_config": wide(
                **_SLIDING,
                hidden_size_per_layer_input=32,
                embedding_dim=64,
                num_global_key_value_heads=2,  # vLLM's runner takes no second width, which the class has by default
                global_head_dim=32,
                model_type="embedding_gemma2_text",
            ),
            "vision_config": _GEMMA4_VISION,
            "audio_config": None,
            **_GEMMA4_TOKENS,
        },
        group="embedding",
        bare=True,
    ),
    Case(
        "modernbert",
        "ModernBERT embed",
        "ModernBertModel",
        "modernbert",
        _LAYER,
        {**_ENCODER, "global_attn_every_n_layers": 2, "local_attention": 8}
        | {"cls_token_id": 0, "sep_token_id": 1},
        group="embedding",
        bare=True,
    ),
    Case(
        "xlm_roberta",
        "bge-m3, e5",
        "XLMRobertaModel",
        "xlm-roberta",
        _LAYER,
        {**_ENCODER, "position_embedding_type": "absolute"},  # as published; vLLM's class asks for it
        group="embedding",
        bare=True,
    ),
)
