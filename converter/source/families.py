"""Where the linears of each model family are: one description per family, no code of its own.

docs/developer/adding-a-model-family.md describes how to add one. The end-to-end tests and the table of supported models
cover every entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bwla_converter.source.structure import InputGroup, Structure
from bwla_kernels.errors import SourceError


@dataclass(frozen=True)
class Family:
    """One supported architecture.

    Attributes:
        name: what the family is called.
        architecture: its class in config.json's `architectures`.
        model_type: transformers' name of its configuration.
        models: well-known models of this architecture, for the documentation.
        groups: input groups of a decoder layer, in execution order.
        layers: module path of the list of decoder layers.
        scaled_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        gguf: llama.cpp's name of the architecture in GGUF files; empty if those of this family cannot be read.
        own_head: whether vLLM's class can have a head apart from its embedding; if not, a tied head stays
            unquantized.
        int8_embedding: whether vLLM's class lets the plugin choose how the embedding is stored; if not, it stays
            unquantized.
        note: special properties, for the documentation.
    """

    name: str
    architecture: str
    model_type: str
    models: str
    groups: tuple[InputGroup, ...]
    layers: str = "model.layers"
    gguf: str = ""
    scaled_embedding: bool = False
    own_head: bool = True
    int8_embedding: bool = True
    note: str = ""

    def structure(self, num_layers: int) -> Structure:
        """Return the structure of a model with `num_layers` decoder layers."""
        return Structure(
            self.architecture,
            self.layers,
            (self.groups,) * num_layers,
            own_head=self.own_head,
            int8_embedding=self.int8_embedding,
            scaled_embedding=self.scaled_embedding,
        )


_QKV = InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_O = InputGroup(("self_attn.o_proj",), stream="input_layernorm", input_sharded=True)
_GATE_UP = InputGroup(("mlp.gate_proj", "mlp.up_proj"))
_DOWN = InputGroup(("mlp.down_proj",), stream="post_attention_layernorm", input_sharded=True)

_GATED_DECODER = (_QKV, _O, _GATE_UP, _DOWN)
_MERGED_DECODER = (InputGroup(("self_attn.qkv_proj",)), _O, InputGroup(("mlp.gate_up_proj",)), _DOWN)
# A norm follows these outputs before they are added to the stream.
_SANDWICHED_DECODER = (_QKV, replace(_O, stream=None), _GATE_UP, replace(_DOWN, stream=None))

FAMILIES = (
    Family(
        "Llama",
        "LlamaForCausalLM",
        "llama",
        "Llama 2, 3, 3.1, 3.2, 3.3 (text)",
        _GATED_DECODER,
        gguf="llama",
    ),
    Family(
        "Mistral",
        "MistralForCausalLM",
        "mistral",
        "Mistral 7B, Nemo, Small 2409",
        _GATED_DECODER,
        gguf="llama",
        note="GGUF files name these models `llama`, so they are read as `LlamaForCausalLM`; without the sliding window "
        "of 7B v0.1, which the files do not record, that computes the same",
    ),
    Family("Qwen2", "Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5", _GATED_DECODER, gguf="qwen2"),
    Family("Qwen3", "Qwen3ForCausalLM", "qwen3", "Qwen3, dense", _GATED_DECODER, gguf="qwen3"),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "gemma2",
        "Gemma 2",
        _SANDWICHED_DECODER,
        scaled_embedding=True,
        gguf="gemma2",
        own_head=False,
        int8_embedding=False,
        note="embedding and head, which are tied, stay unquantized, because vLLM's class cannot quantize them. In "
        'transformers, pass `attn_implementation="eager"`; the default ignores the soft cap',
    ),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        "Gemma 3, text only (270M, 1B)",
        _SANDWICHED_DECODER,
        scaled_embedding=True,
        gguf="gemma3",
        note="the multimodal sizes (`Gemma3ForConditionalGeneration`) are not supported",
    ),
    Family(
        "Phi-3",
        "Phi3ForCausalLM",
        "phi3",
        "Phi-3, Phi-3.5 mini, Phi-4, Phi-4 mini",
        _MERGED_DECODER,
        gguf="phi3",
        note="q, k and v are one linear, and so are gate and up, as in the checkpoint",
    ),
)

GUIDE = "docs/developer/adding-a-model-family.md"


def find_family(config: Mapping[str, Any], source: str) -> Family:
    """Return the family of a model by the architectures in its config.json; `source` names the file in errors.

    Raises:
        SourceError: the architecture is not supported.
    """
    architectures = config.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [architectures]
    for family in FAMILIES:
        if family.architecture in names:
            return family
    supported = ", ".join(f"{family.architecture} ({family.models})" for family in FAMILIES)
    raise SourceError(
        f"{source}: found the architecture {', '.join(map(str, names)) or 'none'}, expected one of {supported}: "
        f"use a supported model, or add the family to converter/source/families.py ({GUIDE} describes how)"
    )


def family_table() -> str:
    """Return the supported families as a Markdown table, for the documentation."""
    head = "| family | models | `architectures` in config.json | in GGUF files | notes |\n|---|---|---|---|---|\n"
    rows = (f"| {f.name} | {f.models} | `{f.architecture}` | {_code(f.gguf)} | {f.note} |" for f in FAMILIES)
    return head + "\n".join(rows)


def _code(text: str) -> str:
    return f"`{text}`" if text else "not read"
