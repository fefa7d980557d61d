"""The architectures that are read from GGUF files, and those that are refused, by llama.cpp's names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.gguf_models import dense, experts, hybrid, reorder
from bwla_converter.source.gguf_models.keys import Keys
from torch import Tensor

Rules = tuple[tuple[str, Callable[[Tensor, Any], Tensor]], ...]
Renamings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        gguf: llama.cpp's name in `general.architecture`.
        model_class: transformers' class, which becomes config.json's `architectures`.
        model_type: transformers' name of its configuration.
        models: well-known models, for the documentation.
        settings: returns the configuration.
        values: regular expressions of tensors in the file whose values llama.cpp's converter changes, with what undoes
            the change. The first one that matches applies.
        names: regular expressions of stored names with their replacements, applied before gguf's table of names, where
            llama.cpp's converter renames tensors itself.
        left_out: returns a regular expression of tensors in the file that transformers does not load.
        note: special properties, for the documentation.
    """

    gguf: str
    model_class: str
    model_type: str
    models: str
    settings: Callable[[GGUFFile, Keys], dict[str, Any]]
    values: Rules = ()
    names: Renamings = ()
    left_out: Callable[[Any], str | None] = lambda config: None
    note: str = ""


_PERMUTED: Rules = ((r"\.attn_q\.", reorder.unpermute_queries), (r"\.attn_k\.", reorder.unpermute_keys))
_SHIFTED: Rules = ((r"norm\.weight", reorder.subtract_one),)
_LINEAR_ATTENTION: Rules = (
    (r"\.ssm_norm\.weight", lambda tensor, config: tensor),
    *_SHIFTED,
    (r"\.ssm_a$", reorder.group_decays),
    (r"\.(attn_gate|ssm_alpha|ssm_beta)\.weight|\.ssm_dt\.bias", reorder.group_value_heads),
    (r"\.(attn_qkv|ssm_conv1d)\.weight", reorder.group_values_of_qkv),
    (r"\.ssm_out\.weight", reorder.group_value_inputs),
)
_STEP: Renamings = ((r"\.dt_bias$", ".dt_proj.bias"),)
_ROUTING_BIAS: Renamings = ((r"\.e_score_correction_bias$", ".e_score_correction.bias"),)


def _predictors(config: Any) -> str:
    """Return the pattern of the blocks that predict several tokens, which follow the decoder layers."""
    return rf"blk\.(?:{config.num_hidden_layers}|{config.num_hidden_layers + 1})\..*"


def _shared_keys(config: Any) -> str | None:
    """Return the pattern of keys and values in the layers that use those of earlier layers."""
    first = config.num_hidden_layers - config.num_kv_shared_layers
    layers = "|".join(str(index) for index in range(first, config.num_hidden_layers))
    return rf"blk\.(?:{layers})\.attn_(?:k|v|k_norm)\.weight" if layers else None


ARCHITECTURES = (
    Architecture(
        "llama",
        "LlamaForCausalLM",
        "llama",
        "Llama 2, 3, 3.1, 3.2, 3.3, Mistral 7B, Nemo, Small 2409, SmolLM 1 and 2",
        dense.llama,
        _PERMUTED,
        note="Mistral's files have this name too, without the sliding window of 7B v0.1",
    ),
    Architecture("qwen2", "Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5", dense.qwen2),
    Architecture("qwen3", "Qwen3ForCausalLM", "qwen3", "Qwen3, dense", dense.qwen3),
    Architecture("gemma2", "Gemma2ForCausalLM", "gemma2", "Gemma 2", dense.gemma2, _SHIFTED),
    Architecture(
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        "Gemma 3",
        dense.gemma3,
        _SHIFTED,
        note="the language model; the vision tower is in a file of its own",
    ),
    Architecture(
        "gemma4",
        "Gemma4ForCausalLM",
        "gemma4_text",
        "Gemma 4",
        hybrid.gemma4,
        names=(
            (r"\.router\.scale$", ".router.proj.scale"),
            (r"\.router\.per_expert_scale$", ".experts.down_proj.scale"),
        ),
        left_out=_shared_keys,
        note="the language model; the vision tower is in a file of its own",
    ),
    Architecture("phi3", "Phi3ForCausalLM", "phi3", "Phi-3, Phi-3.5 mini, Phi-4, Phi-4 mini", dense.phi3),
    Architecture(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "starcoder2",
        "StarCoder2",
        dense.starcoder2,
        note="without its sliding window, which the files do not record and llama.cpp does not have",
    ),
    Architecture("stablelm", "StableLmForCausalLM", "stablelm", "StableLM 2", dense.stablelm),
    Architecture(
        "nemotron", "NemotronForCausalLM", "nemotron", "Nemotron 4, Minitron", dense.nemotron, _SHIFTED
    ),
    Architecture(
        "falcon",
        "FalconForCausalLM",
        "falcon",
        "Falcon 7B to 180B",
        dense.falcon,
        ((r"\.attn_qkv\.", reorder.interleave_falcon),),
    ),
    Architecture(
        "bloom",
        "BloomForCausalLM",
        "bloom",
        "BLOOM",
        dense.bloom,
        ((r"\.attn_qkv\.", reorder.interleave_bloom),),
        names=((r"^transformer\.", ""),),
    ),
    Architecture("lfm2", "Lfm2ForCausalLM", "lfm2", "LFM2", hybrid.lfm2),
    Architecture(
        "qwen35",
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        "Qwen3.5, 3.6, dense",
        hybrid.qwen35,
        _LINEAR_ATTENTION,
        _STEP,
        _predictors,
        note="the language model; the blocks that predict several tokens are left out",
    ),
    Architecture(
        "qwen35moe",
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        "Qwen3.5, 3.6 with experts",
        hybrid.qwen35,
        _LINEAR_ATTENTION,
        _STEP,
        _predictors,
        note="the language model; the blocks that predict several tokens are left out",
    ),
    Architecture(
        "qwen2moe", "Qwen2MoeForCausalLM", "qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B", experts.qwen2_moe
    ),
    Architecture(
        "qwen3moe", "Qwen3MoeForCausalLM", "qwen3_moe", "Qwen3-30B-A3B, 235B, Coder", experts.qwen3_moe
    ),
    Architecture("gpt-oss", "GptOssForCausalLM", "gpt_oss", "gpt-oss 20B, 120B", experts.gpt_oss),
    Architecture(
        "minimax-m2",
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        "MiniMax M2",
        experts.minimax_m2,
        names=_ROUTING_BIAS,
    ),
)
"""The architectures, in the order of the documentation."""

_ENCODER = "its encoder and decoder are not a decoder alone, which is what is converted"
REFUSED: Mapping[str, str] = {
    "t5": _ENCODER,
    "t5encoder": "it is an encoder, and decoders are what is converted",
    "gpt2": "transformers stores its linears as Conv1D, and nn.Linear is what is converted",
    "mamba": "vLLM passes its layers no quantization config",
    "deci": "transformers has no class of it, and code from the Hub is not run",
}
"""Architectures that transformers reads, with the reason why they are not converted."""


def find_architecture(name: str) -> Architecture | None:
    """Return the architecture with llama.cpp's name; None if it is not read."""
    return next((found for found in ARCHITECTURES if found.gguf == name), None)


def gguf_table() -> str:
    """Return the architectures as a Markdown table, for the documentation."""
    head = "| in GGUF files | models | class in config.json | notes |\n|---|---|---|---|\n"
    rows = [f"| `{a.gguf}` | {a.models} | `{a.model_class}` | {a.note} |" for a in ARCHITECTURES]
    rows += [f"| `{name}` |  | refused | {reason} |" for name, reason in REFUSED.items()]
    return head + "\n".join(rows)
