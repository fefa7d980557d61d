"""What vLLM's model classes can store quantized, by architecture.

The converter does not import vLLM. tests/vllm/test_serving_facts.py compares these tables with the installed one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

TIED_ONLY = frozenset(
    {
        "Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "CohereForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3nForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "Zamba2ForCausalLM",
    }
)
"""Their logits come from the embedding: their classes have no `ParallelLMHead`, or tie it whatever the config says."""

INT8_HEAD = frozenset(
    {
        "AfmoeForCausalLM",
        "DbrxForCausalLM",
        "FalconForCausalLM",
        "GPTJForCausalLM",
        "GemmaForCausalLM",
        "Glm4MoeForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "HYV3ForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "LongcatFlashForCausalLM",
        "MiniCPM3ForCausalLM",
        "MixtralForCausalLM",
        "NemotronForCausalLM",
        "OlmoHybridForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
    }
)
"""Their heads get the `quant_config`, their embeddings do not."""

INT8_BOTH = frozenset(
    {
        "AXK1ForCausalLM",
        "ApertusForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Ernie4_5ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "Exaone4ForCausalLM",
        "ExaoneMoeForCausalLM",
        "GPT2LMHeadModel",
        "Gemma3ForCausalLM",
        "Gemma4ForCausalLM",
        "Glm4ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "GraniteSWAForCausalLM",
        "HrmTextForCausalLM",
        "HyperCLOVAXForCausalLM",
        "LagunaForCausalLM",
        "Llama4ForCausalLM",
        "LlamaForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiniMaxM2ForCausalLM",
        "Ministral3ForCausalLM",
        "MistralForCausalLM",
        "NemotronHForCausalLM",
        "OlmoeForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "StableLmForCausalLM",
    }
)
"""Both their heads and their embeddings get the `quant_config`."""

_MAMBA_1 = "vLLM's Mamba-1 layer takes no quantization config"

PLAIN: Mapping[str, Mapping[str, str]] = {
    "FalconMambaForCausalLM": {"mixer": _MAMBA_1},
    "JambaForCausalLM": {"mamba": _MAMBA_1},
    "MambaForCausalLM": {"mixer": _MAMBA_1},
}
"""Parts of a decoder layer to which vLLM's class passes no `quant_config`, with the reason."""


RESHAPED: Mapping[str, Mapping[str, str]] = {
    "BloomForCausalLM": {"self_attention.query_key_value": "vLLM divides its weight by heads while loading"},
}
"""Linears whose tensors vLLM's class takes for ordinary weights while it loads them, with the reason."""

UNNAMED: Mapping[str, Mapping[str, str]] = {
    "MiniCPM3ForCausalLM": {"self_attn.q_a_proj": "vLLM's class does not tell this linear its name"},
}
"""Linears that cannot look up their settings in vLLM, with the reason."""

LISTED: Mapping[str, Mapping[str, str]] = {
    "GraniteMoeHybridForCausalLM": {
        "block_sparse_moe.experts": "vLLM's class loads only weights and scales of experts"
    },
}
"""Experts whose parameters vLLM's class looks up in a list of names, which has no rotations, with the reason."""


_WEIGHT_ONLY = "vLLM's class fuses it by the name of its weight alone"

UNMAPPED: Mapping[str, Mapping[str, str]] = {
    "EmbeddingGemma2Model": dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), _WEIGHT_ONLY
    ),
}
"""Parts of fused linears whose other tensors vLLM's class does not load, with the reason."""


@dataclass(frozen=True)
class ServingFacts:
    """What vLLM's class of an architecture can store quantized.

    Attributes:
        own_head: whether it can have a head apart from its embedding.
        int8_head: whether the plugin can choose how its head is stored.
        int8_embedding: whether the plugin can choose how its embedding is stored.
        plain: parts of a decoder layer that it cannot quantize -> the reason.
    """

    own_head: bool
    int8_head: bool
    int8_embedding: bool
    plain: Mapping[str, str] = field(default_factory=dict)


def serving_facts(architecture: str) -> ServingFacts:
    """Return what vLLM's class of `architecture` can store quantized; for an unknown one, what is sure to be served."""
    both = architecture in INT8_BOTH
    return ServingFacts(
        own_head=architecture not in TIED_ONLY,
        int8_head=both or architecture in INT8_HEAD,
        int8_embedding=both,
        plain={
            part: reason
            for table in (PLAIN, RESHAPED, UNNAMED, UNMAPPED, LISTED)
            for part, reason in table.get(architecture, {}).items()
        },
    )
