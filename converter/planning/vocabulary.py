"""Choose how the vocabulary's two matrices are stored: the language-model head and the embedding."""

import math
from collections.abc import Sequence

from bwla_converter.options import HEAD_PLANES
from bwla_converter.source.model import Source
from bwla_converter.source.structure import Structure
from bwla_kernels.errors import SourceError
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE
from bwla_kernels.format.schema import is_ignored

LARGE_HEAD = 2**26
"""Size in weights from which a tied head gets an 8-bit tensor of its own by default."""


def bits_unless_ignored(module: str, flag: str, bits: int | None, ignore: Sequence[str]) -> int | None:
    """Return the bits of the head or the embedding: 16 if `ignore` names it, else `bits`.

    Raises:
        SourceError: `ignore` names it, and `bits` asks for fewer bits.
    """
    if not is_ignored(module, ignore):
        return bits
    if bits not in (None, 16):
        raise SourceError(
            f"{module}: expected {flag} 16 with --ignore {module}, found {bits}: give one of the two"
        )
    return 16


def is_head_quantizable(structure: Structure) -> bool:
    """Return whether vLLM can serve a quantized head for the model's family."""
    return structure.own_head and structure.int8_head and structure.head == HEAD_MODULE


def choose_head(source: Source, bits: int | None) -> str | None:
    """Return the name of the tensor to make a quantized head from, or None to leave the head as it is.

    Args:
        source: the model.
        bits: binary planes, 8, 16, or None to choose: 8 for an untied head, and for a large tied one. A quantized tied
            head is one more tensor on disk, but is read in every step instead of the larger embedding.

    Raises:
        SourceError: `bits` is none of these, or asks for a head that vLLM does not support for the model's family.
    """
    if bits not in (None, *HEAD_PLANES, 8, 16):
        planes = ", ".join(map(str, HEAD_PLANES))
        raise SourceError(f"--lm-head-bits: expected {planes}, 8, 16 or auto, found {bits}")
    structure, required = source.structure, bits not in (None, 16)
    if not structure.own_head and (required or not source.tied_head):
        option = f"--lm-head-bits {bits}" if source.tied_head else "tie_word_embeddings false"
        raise SourceError(
            f"{source.folder}: vLLM always uses the embedding as the head of {structure.architecture}, so it has to be "
            f"tied and unquantized, found {option}: use --lm-head-bits auto and a tied model"
        )
    storable = is_head_quantizable(structure)
    if required and not storable:
        raise SourceError(
            f"{source.folder}: vLLM has no quantized head for {structure.architecture}, found --lm-head-bits {bits}: "
            "use --lm-head-bits auto"
        )
    if not storable:
        return None
    name = source.output_weight
    if bits == 16 or name not in source.entries:
        return None
    large = math.prod(source.entries[name].shape) >= LARGE_HEAD
    return name if required or large or not source.tied_head else None


def choose_embedding(source: Source, bits: int | None, head_bits: int | None = None) -> str | None:
    """Return the name of the tensor to make an 8-bit embedding from, or None to leave the embedding as it is.

    A tied head is then the 8-bit embedding too, unless it is stored in binary planes.

    Args:
        source: the model.
        bits: 8, 16, or None to choose: 8, which costs less than 0.1 % of perplexity
            (benchmarks/results/embedding.json), unless vLLM cannot serve it or a tied head is to stay unquantized.
        head_bits: bits of the head, see `choose_head`.

    Raises:
        SourceError: `bits` is none of these, or 8 bits cannot be had.
    """
    if bits not in (None, 8, 16):
        raise SourceError(f"--embedding-bits: expected 8, 16 or auto, found {bits}")
    structure = source.structure
    storable = structure.int8_embedding and structure.embedding == EMBEDDING_MODULE
    if bits == 8 and not storable:
        raise SourceError(
            f"{source.folder}: vLLM has no quantized embedding for {structure.architecture}, found --embedding-bits 8: "
            "use --embedding-bits auto"
        )
    if bits == 8 and source.tied_head and head_bits == 16:
        raise SourceError(
            f"{source.folder}: the head is tied to the embedding, so both have the same bits, found "
            "--embedding-bits 8 and --lm-head-bits 16: use auto for one of them"
        )
    is_shared = source.tied_head and head_bits == 16
    return None if bits == 16 or is_shared or not storable else source.embedding_weight


def head_in_planes(
    source: Source, bits: int | None, rank: int, activation_bits: int, clip: float
) -> LayerSpec | None:
    """Return the spec of a head in binary planes; None where `bits` asks for another one.

    Args:
        source: the model.
        bits: bits of the head, see `choose_head`.
        rank, activation_bits, clip: as those of the decoder layers' linears.
    """
    name = choose_head(source, bits) if bits in HEAD_PLANES else None
    if bits is None or name is None:
        return None
    rows, columns = source.entries[name].shape
    has_bias = f"{HEAD_MODULE}.bias" in source.entries
    sizes = choose_rotation(columns, 1)
    return LayerSpec(
        rows, columns, *sizes, rank=rank, bits=activation_bits, clip=clip, bias=has_bias, planes=bits
    )
