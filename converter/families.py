"""Where a model family keeps its linears: one description a family, no code path of its own.

To add a family, add a `Family`: the architecture's name in config.json, the name of its decoder blocks, and
its input groups in execution order. The end-to-end tests run over every entry.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bwla_kernels.errors import SourceError
from bwla_kernels.factorize import SHARDED_BLOCKS


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input and so share the whole input side.

    Attributes:
        members: module paths inside the block.
        input_sharded: whether tensor parallelism cuts the input (o_proj, down_proj).
    """

    members: tuple[str, ...]
    input_sharded: bool = False

    @property
    def wished_blocks(self) -> int:
        """Rotation blocks wished for: 8 where ranks must hold whole blocks, else one."""
        return SHARDED_BLOCKS if self.input_sharded else 1


@dataclass(frozen=True)
class Family:
    """One supported architecture."""

    name: str
    architecture: str
    groups: tuple[Group, ...]
    blocks: str = "model.layers"

    def block_name(self, index: int) -> str:
        """Module path of decoder block `index`."""
        return f"{self.blocks}.{index}"

    def linears(self) -> Iterator[tuple[Group, str]]:
        """Every quantized linear of a block with its group, in execution order."""
        for group in self.groups:
            for member in group.members:
                yield group, member


_GATED_DECODER = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Group(("self_attn.o_proj",), input_sharded=True),
    Group(("mlp.gate_proj", "mlp.up_proj")),
    Group(("mlp.down_proj",), input_sharded=True),
)

FAMILIES = (
    Family("Llama", "LlamaForCausalLM", _GATED_DECODER),
    Family("Mistral", "MistralForCausalLM", _GATED_DECODER),
    Family("Qwen2", "Qwen2ForCausalLM", _GATED_DECODER),
    Family("Qwen3", "Qwen3ForCausalLM", _GATED_DECODER),
)


def find_family(config: Mapping[str, Any], source: str) -> Family:
    """Pick the family of a model by the architectures of its config.json; `source` names the file.

    Raises:
        SourceError: the architecture is not supported, or the model is quantized already.
    """
    found = config.get("architectures") or []
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise SourceError(
            f"{source}: expected an unquantized model, found one quantized with {method}: "
            "convert the original checkpoint instead"
        )
    for family in FAMILIES:
        if family.architecture in found:
            return family
    supported = ", ".join(family.architecture for family in FAMILIES)
    raise SourceError(
        f"{source}: expected one of the architectures {supported}, found {', '.join(found) or 'none'}: "
        "a new one is a few lines in converter/families.py"
    )
