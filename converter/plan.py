"""What a conversion will do, settled from headers alone: a spec for every linear, the rank, the sizes on disk."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bwla_converter.ledger import auto_rank, bits_per_weight, stored_bits, weights_of
from bwla_converter.source import Source
from bwla_kernels.errors import SourceError
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.schema import BWLAFormat, Provenance, activation_args


@dataclass(frozen=True)
class Plan:
    """Everything about the output that is known before a weight is read.

    Attributes:
        specs: spec of every linear to quantize, by module path, in execution order.
        rank: rank of the low-rank correction, the same everywhere.
        format: the `quantization_config` to be written.
    """

    specs: Mapping[str, LayerSpec]
    rank: int
    format: BWLAFormat

    @property
    def weights(self) -> int:
        """Weights to quantize."""
        return sum(map(weights_of, self.specs.values()))

    @property
    def bits_per_weight(self) -> float:
        """All-in stored bits per quantized weight."""
        return bits_per_weight(self.specs.values())

    def output_bytes(self, source: Source) -> int:
        """Bytes of the output's tensors: quantized linears, and everything else as it is."""
        kept = (
            entry for name, entry in source.entries.items() if name.removesuffix(".weight") not in self.specs
        )
        kept_bytes = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in kept)
        return kept_bytes + sum(map(stored_bits, self.specs.values())) // 8


def input_bytes(source: Source) -> int:
    """Bytes of the source's tensors."""
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in source.entries.values())


def make_plan(source: Source, rank: int | None, bits: int, clip: float, provenance: Provenance) -> Plan:
    """Choose rotations and rank for every linear of `source`.

    Args:
        source: the checked model.
        rank: rank of the correction; None for the largest within 1.16 all-in bits per weight.
        bits: activation bits, 2..8 or 16.
        clip: activation clip in (0, 1].
        provenance: what is recorded of the conversion.

    Raises:
        FormatError: bits, clip or rank out of range.
        SourceError: a rank larger than a linear.
    """
    specs: dict[str, LayerSpec] = {}
    rotation: dict[str, tuple[int, int, int]] = {}
    for index in range(source.num_blocks):
        for group, member in source.family.linears():
            name = f"{source.family.block_name(index)}.{member}"
            out_features, in_features = source.entries[f"{name}.weight"].shape
            sizes = choose_rotation(in_features, group.wished_blocks)
            has_bias = f"{name}.bias" in source.entries
            specs[name] = LayerSpec(out_features, in_features, *sizes, bits=bits, clip=clip, bias=has_bias)
            # A block whose widths differ from the first one's gets an entry of its own.
            leaf = member.rpartition(".")[2]
            if rotation.setdefault(leaf, sizes) != sizes:
                rotation[name] = sizes
    if rank is None:
        rank = auto_rank(specs.values())
    for name, spec in specs.items():
        if rank > min(spec.out_features, spec.in_features):
            raise SourceError(
                f"{name}: rank {rank} is more than its {spec.out_features} x {spec.in_features} weight holds: "
                "choose a smaller --rank, or auto"
            )
        specs[name] = replace(spec, rank=rank)
    format_ = BWLAFormat(
        input_activations=activation_args(bits),
        clip=clip,
        rank=rank,
        rotation=rotation,
        provenance=provenance,
    )
    return Plan(specs, rank, format_)
