"""Recognize models whose weights have one bit or three values already, and plan to store them without loss.

The values decide, not how they are stored: a GGUF file of type Q1_0, a BitNet checkpoint and its weights unpacked to
float16 are all recognized.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bwla_converter.planning.plan import ConversionPlan, assemble
from bwla_converter.planning.vocabulary import (
    bits_unless_ignored,
    choose_embedding,
    choose_head,
    is_head_quantizable,
)
from bwla_converter.quantize.lossless import Groups, find_groups
from bwla_converter.source.model import Source
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import kind_of
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE
from bwla_kernels.format.schema import Provenance

DEFAULT_ACTIVATION_BITS = 8
"""Activation bits: these models are trained and run elsewhere with 8, and have no rotation that would permit fewer."""


@dataclass(frozen=True)
class LosslessWeights:
    """How a model's weights can be stored without loss.

    Attributes:
        linears: of every linear to quantize, by module path; equal within an input group.
        head: of the head; None where it has more values, or where vLLM cannot serve it in planes.
    """

    linears: Mapping[str, Groups]
    head: Groups | None


def find_lossless(source: Source) -> LosslessWeights | None:
    """Return how the weights of a model can be stored without loss; None if they cannot, or not all.

    Reads the first decoder layer with linears to quantize, the one in the middle and the last one; the others are
    expected to be alike (`store_lossless` checks).
    """
    layers = [index for index in range(source.num_layers) if source.linears_of_layer(index)]
    if not layers or source.structure.experts:
        return None
    kinds: dict[str, Groups] = {}
    for index in dict.fromkeys((layers[0], layers[len(layers) // 2], layers[-1])):
        for _, names in source.groups_of_layer(index):
            for name in names:
                found = find_groups(source.read([f"{name}.weight"])[f"{name}.weight"])
                if found is None:
                    return None
                kind = kind_of(names[0])
                kinds[kind] = found.together(kinds.get(kind, found))
    linears: dict[str, Groups] = {}
    for index in layers:
        for _, names in source.groups_of_layer(index):
            if kind_of(names[0]) not in kinds:
                return None
            linears |= dict.fromkeys(names, kinds[kind_of(names[0])])
    return LosslessWeights(linears, _head_groups(source))


def _head_groups(source: Source) -> Groups | None:
    if not is_head_quantizable(source.structure) or source.output_weight not in source.entries:
        return None
    return find_groups(source.read([source.output_weight])[source.output_weight])


def plan_lossless(
    source: Source,
    weights: LosslessWeights,
    bits: int | None,
    provenance: Provenance,
    head_bits: int | None = None,
    embedding_bits: int | None = None,
) -> ConversionPlan:
    """Plan to store a model without loss.

    Args:
        source: the checked model.
        weights: how its weights are stored.
        bits: activation bits; None for 8.
        provenance: what the output records about the conversion.
        head_bits: bits of the head: 8, 16, or None for planes without loss where it has them, else as an 8-bit
            embedding that it is tied to, else 16.
        embedding_bits: bits of the embedding, 8 or 16; None for 16.

    Raises:
        SourceError: `head_bits` or `embedding_bits` is not supported.
    """
    bits = DEFAULT_ACTIVATION_BITS if bits is None else bits
    specs = {
        name: _spec(source, f"{name}.weight", groups, bits, f"{name}.bias" in source.entries)
        for name, groups in weights.linears.items()
    }
    head_bits = bits_unless_ignored(HEAD_MODULE, "--lm-head-bits", head_bits, source.ignore)
    embedding_bits = bits_unless_ignored(EMBEDDING_MODULE, "--embedding-bits", embedding_bits, source.ignore)
    head_spec = None
    if head_bits is None and weights.head is not None:
        has_bias = f"{HEAD_MODULE}.bias" in source.entries
        head_spec = _spec(source, source.output_weight, weights.head, bits, has_bias)
    embedding_source = choose_embedding(source, embedding_bits or 16, head_bits)
    is_embedding = source.tied_head and embedding_source and head_spec is None
    head_source = None if is_embedding else choose_head(source, head_bits or 16)
    if head_spec is not None:
        head_source = source.output_weight
    return assemble(source, specs, 0, provenance, head_source, embedding_source, head_spec)


def _spec(source: Source, weight: str, groups: Groups, bits: int, has_bias: bool) -> LayerSpec:
    rows, columns = source.entries[weight].shape
    return LayerSpec(
        rows,
        columns,
        columns // groups.size,
        1,
        groups.size,
        bits=bits,
        bias=has_bias,
        planes=groups.planes,
        grouped=True,
    )


def not_lossless(source: Source) -> SourceError:
    """Return the error for a model that recipe `lossless` is asked to store."""
    return SourceError(
        f"{source.folder}: expected linears of two or three values in each group of 32 to 256 columns, or in each row, "
        "for recipe lossless, found others: use --recipe fast, which quantizes any weight"
    )
