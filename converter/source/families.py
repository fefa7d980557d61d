"""Where a model family keeps its linears: one description a family, no code path of its own.

docs/developer/adding-a-model-family.md describes how to add one. The end-to-end tests and the table of supported models
cover every entry.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bwla_kernels.errors import SourceError
from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that read the same input and so share the whole input side.

    Attributes:
        members: module paths inside the block.
        input_sharded: whether tensor parallelism cuts the input (o_proj, down_proj).
        stream: module path, inside the block, of what reads the residual stream just before this group's output is
            added to it; None where the output is not added as it is.
    """

    members: tuple[str, ...]
    input_sharded: bool = False
    stream: str | None = None

    @property
    def preferred_rotation_groups(self) -> int:
        """Rotation blocks wished for: 8 where ranks must hold whole blocks, else one."""
        return SHARDED_ROTATION_GROUPS if self.input_sharded else 1


@dataclass(frozen=True)
class Family:
    """One supported architecture.

    Attributes:
        name: what the family is called.
        architecture: its class in config.json's `architectures`.
        model_type: transformers' name of its configuration.
        models: well-known models of this architecture, for the documentation.
        groups: input groups of a decoder block, in execution order.
        blocks: module path of the decoder blocks.
        scaled_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        own_head: whether vLLM can give this architecture a head apart from its embedding; where it cannot, a tied
            head stays as it is.
        note: special properties, for the documentation.
    """

    name: str
    architecture: str
    model_type: str
    models: str
    groups: tuple[InputGroup, ...]
    blocks: str = "model.layers"
    scaled_embedding: bool = False
    own_head: bool = True
    note: str = ""

    def layer_name(self, index: int) -> str:
        """Module path of decoder block `index`."""
        return f"{self.blocks}.{index}"

    def group_of(self, name: str) -> InputGroup:
        """The input group that the linear called `name`, by its full name, belongs to."""
        return next(group for group, member in self.linears() if name.endswith(f".{member}"))

    def linears(self) -> Iterator[tuple[InputGroup, str]]:
        """Every quantized linear of a block with its group, in execution order."""
        for group in self.groups:
            for member in group.members:
                yield group, member


_QKV = InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_O = InputGroup(("self_attn.o_proj",), input_sharded=True, stream="input_layernorm")
_GATE_UP = InputGroup(("mlp.gate_proj", "mlp.up_proj"))
_DOWN = InputGroup(("mlp.down_proj",), input_sharded=True, stream="post_attention_layernorm")

_GATED_DECODER = (_QKV, _O, _GATE_UP, _DOWN)
_MERGED_DECODER = (InputGroup(("self_attn.qkv_proj",)), _O, InputGroup(("mlp.gate_up_proj",)), _DOWN)
# A norm stands between these outputs and the stream.
_SANDWICHED_DECODER = (_QKV, replace(_O, stream=None), _GATE_UP, replace(_DOWN, stream=None))

FAMILIES = (
    Family("Llama", "LlamaForCausalLM", "llama", "Llama 2, 3, 3.1, 3.2, 3.3 (text)", _GATED_DECODER),
    Family("Mistral", "MistralForCausalLM", "mistral", "Mistral 7B, Nemo, Small 2409", _GATED_DECODER),
    Family("Qwen2", "Qwen2ForCausalLM", "qwen2", "Qwen2, Qwen2.5", _GATED_DECODER),
    Family("Qwen3", "Qwen3ForCausalLM", "qwen3", "Qwen3, dense", _GATED_DECODER),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "gemma2",
        "Gemma 2",
        _SANDWICHED_DECODER,
        scaled_embedding=True,
        own_head=False,
        note="the head is tied to the embedding and stays unquantized, because vLLM's class has no separate head. In "
        'transformers, pass `attn_implementation="eager"`; the default ignores the soft cap',
    ),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        "Gemma 3, text only (270M, 1B)",
        _SANDWICHED_DECODER,
        scaled_embedding=True,
        note="the multimodal sizes (`Gemma3ForConditionalGeneration`) are not supported",
    ),
    Family(
        "Phi-3",
        "Phi3ForCausalLM",
        "phi3",
        "Phi-3, Phi-3.5 mini, Phi-4, Phi-4 mini",
        _MERGED_DECODER,
        note="q, k and v are one linear, and so are gate and up, as in the checkpoint",
    ),
)

GUIDE = "docs/developer/adding-a-model-family.md"


def find_family(config: Mapping[str, Any], source: str) -> Family:
    """Pick the family of a model by the architectures of its config.json; `source` names the file.

    Raises:
        SourceError: the architecture is not supported.
    """
    found = config.get("architectures") or []
    names = found if isinstance(found, list) else [found]
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
    head = "| family | models | `architectures` in config.json | notes |\n|---|---|---|---|\n"
    rows = (f"| {f.name} | {f.models} | `{f.architecture}` | {f.note} |" for f in FAMILIES)
    return head + "\n".join(rows)
