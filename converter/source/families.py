"""The families of models that the documentation names, because they are tested most.

No model needs an entry here: its structure is observed (`bwla_converter.source.observe`). What is read from GGUF files
is listed in `bwla_converter.source.gguf_models.architectures`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: what the family is called.
        architecture: its class in config.json's `architectures`.
        model_type: transformers' name of its configuration.
        models: well-known models of this architecture, for the documentation.
        gguf: llama.cpp's name of the architecture in GGUF files.
        note: special properties, for the documentation.
    """

    name: str
    architecture: str
    model_type: str
    models: str
    gguf: str
    note: str = ""


FAMILIES = (
    Family("Llama", "LlamaForCausalLM", "llama", "Llama 2, 3, 3.1, 3.2, 3.3 (text)", gguf="llama"),
    Family(
        "Mistral",
        "MistralForCausalLM",
        "mistral",
        "Mistral 7B, Nemo, Small 2409",
        gguf="llama",
        note="GGUF files name these models `llama`, so they are read as `LlamaForCausalLM`; without the sliding window "
        "of 7B v0.1, which the files do not record, that computes the same",
    ),
    Family("Qwen2", "Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5", gguf="qwen2"),
    Family("Qwen3", "Qwen3ForCausalLM", "qwen3", "Qwen3, dense", gguf="qwen3"),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "gemma2",
        "Gemma 2",
        gguf="gemma2",
        note="embedding and head, which are tied, stay unquantized, because vLLM's class cannot quantize them. In "
        'transformers, pass `attn_implementation="eager"`; the default ignores the soft cap',
    ),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        "Gemma 3, text only (270M, 1B)",
        gguf="gemma3",
    ),
    Family(
        "Phi-3",
        "Phi3ForCausalLM",
        "phi3",
        "Phi-3, Phi-3.5 mini, Phi-4, Phi-4 mini",
        gguf="phi3",
        note="q, k and v are one linear, and so are gate and up, as in the checkpoint",
    ),
)


def family_table() -> str:
    """Return the families as a Markdown table, for the documentation."""
    head = "| family | models | `architectures` in config.json | in GGUF files | notes |\n|---|---|---|---|---|\n"
    rows = (f"| {f.name} | {f.models} | `{f.architecture}` | `{f.gguf}` | {f.note} |" for f in FAMILIES)
    return head + "\n".join(rows)
