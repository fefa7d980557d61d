"""Plan a conversion from the model's headers: a spec for every linear, the rank, head and embedding, sizes on disk."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from bwla_converter.common.bits import (
    auto_rank,
    bits_per_weight,
    largest_fitting_rank,
    num_weights,
    rank_budget,
    total_bits,
)
from bwla_converter.common.tensors import entry_bytes
from bwla_converter.planning.vocabulary import (
    bits_unless_ignored,
    choose_embedding,
    choose_head,
    head_in_planes,
)
from bwla_converter.source.model import Source
from bwla_converter.source.structure import Structure
from bwla_kernels.errors import SourceError
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import has_experts, kind_of, settings_name
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE
from bwla_kernels.format.schema import (
    BWLAFormat,
    ExpertsFormat,
    Provenance,
    activation_args,
    head_args,
    is_ignored,
    longest_suffix,
)

Value = TypeVar("Value")

DEFAULT_BITS = 6
"""Activation bits, as in the paper."""


@dataclass(frozen=True)
class ConversionPlan:
    """Everything about the output that follows from the model's headers and the options.

    Attributes:
        specs: spec of every linear to quantize, by module path, in execution order.
        rank: rank of the low-rank correction, the same for all linears.
        fitting_rank: the largest rank within the bit budget where the rank was chosen automatically (see
            `bits.auto_rank`), else `rank`.
        format: the `quantization_config` of the output.
        head_source: name of the tensor that a stored quantized head is made from; None where none is stored.
        embedding_source: name of the tensor that the 8-bit embedding is made from; None where it stays unquantized.
        tied_head: whether the head is the embedding, in 8 bits or unquantized.
        head_spec: spec of a head in binary planes; None for one in 8 or 16 bits.
    """

    specs: Mapping[str, LayerSpec]
    rank: int
    fitting_rank: int
    format: BWLAFormat
    head_source: str | None = None
    embedding_source: str | None = None
    tied_head: bool = False
    head_spec: LayerSpec | None = None

    @property
    def all_specs(self) -> dict[str, LayerSpec]:
        """`specs`, and that of a head in binary planes."""
        return {**self.specs, **({} if self.head_spec is None else {HEAD_MODULE: self.head_spec})}

    @property
    def weights(self) -> int:
        """Number of weights to quantize."""
        return sum(map(num_weights, self.specs.values()))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, everything counted."""
        return bits_per_weight(self.specs)

    @property
    def weights_by_planes(self) -> dict[int, int]:
        """Number of planes -> weights that have as many."""
        counts: dict[int, int] = {}
        for spec in self.specs.values():
            counts[spec.planes] = counts.get(spec.planes, 0) + num_weights(spec)
        return dict(sorted(counts.items()))

    def output_bytes(self, source: Source) -> int:
        """Return the size of the output's tensors: what is quantized, and all others unchanged."""
        kept = (entry for name, entry in source.entries.items() if not self.is_replaced(name))
        int8_shapes = (source.entries[name].shape for name in self.int8_sources.values())
        int8_bytes = sum(rows * columns + 4 * rows for rows, columns in int8_shapes)
        return sum(map(entry_bytes, kept)) + int8_bytes + total_bits(self.all_specs) // 8

    @property
    def int8_sources(self) -> dict[str, str]:
        """Modules that are stored in 8 bits (head, embedding), each with the name of the tensor it is made from."""
        head = self.head_source if self.head_spec is None else None
        sources = {HEAD_MODULE: head, EMBEDDING_MODULE: self.embedding_source}
        return {module: name for module, name in sources.items() if name is not None}

    @property
    def vocabulary_sources(self) -> set[str]:
        """Names of the tensors that the quantized head and embedding are made from."""
        return {name for name in (self.head_source, self.embedding_source) if name is not None}

    def is_replaced(self, name: str) -> bool:
        """Return whether the output has a quantized form of the source's tensor `name` instead of a copy."""
        if name == f"{HEAD_MODULE}.weight":  # a tied head may be stored beside the embedding
            return self.head_source is not None or (self.tied_head and self.embedding_source is not None)
        return name.removesuffix(".weight") in self.specs or name == self.embedding_source


def input_bytes(source: Source) -> int:
    """Return the size of the source's tensors."""
    return sum(map(entry_bytes, source.entries.values()))


def namesakes(
    source: Source,
    quantized: Collection[str],
    sizes: Mapping[str, object],
    ignore: Sequence[str],
) -> Iterator[str]:
    """Yield the modules that stay in 16 bits but that loaders would take for quantized by the end of their name.

    Args:
        source: the model.
        quantized: module paths of what is quantized.
        sizes: the rotations, or the sizes of the groups, by the end of a module's name.
        ignore: what is left unquantized for other reasons.
    """
    for name in source.entries:
        module, _, key = name.rpartition(".")
        is_plain = key == "weight" and module not in quantized and not is_ignored(module, ignore)
        if is_plain and longest_suffix(sizes, module) is not None:
            yield module


def _name_from_layers(structure: Structure, name: str) -> str:
    """Return the end of a linear's full name that starts at the list of decoder layers: `layers.1.mlp.down_proj`."""
    name = settings_name(name)
    stem = structure.layers.rpartition(".")[0]
    return name.removeprefix(f"{stem}.") if stem else name


def _sizes_of(spec: LayerSpec) -> tuple[int, int, int] | int:
    """Return the rotation of a linear, or the columns of its groups."""
    return spec.group_width if spec.grouped else (spec.rotation_groups, spec.n1, spec.n2)


def _sizes_by_name(structure: Structure, specs: Mapping[str, LayerSpec]) -> dict[str, Any]:
    """Return the rotation, or the columns of a group, of all linears by the end of their names."""
    sizes: dict[str, tuple[int, int, int] | int] = {}
    for name, spec in specs.items():
        # The entry by the linear's short name holds for all layers; one with another width gets its own. It starts at
        # the list of layers, because vLLM may call what is around it differently (Gemma 4).
        if sizes.setdefault(kind_of(name), _sizes_of(spec)) != _sizes_of(spec):
            sizes[_name_from_layers(structure, name)] = _sizes_of(spec)
    return sizes


def assemble(
    source: Source,
    specs: Mapping[str, LayerSpec],
    fitting_rank: int,
    provenance: Provenance,
    head_source: str | None,
    embedding_source: str | None,
    head_spec: LayerSpec | None,
) -> ConversionPlan:
    """Return the plan for linears and a vocabulary whose form is decided, with the `quantization_config` of the output.

    Args:
        source: the checked model.
        specs: spec of every linear, by module path, in execution order: with the same bits, clip and rank, and either
            all with a rotation or all with scales for groups of columns.
        fitting_rank, head_source, embedding_source, head_spec: as in `ConversionPlan`.
        provenance: what the output records about the conversion.
    """
    first = next(iter(specs.values()))
    quantized = {**specs, **({} if head_spec is None else {HEAD_MODULE: head_spec})}
    sizes = _sizes_by_name(source.structure, quantized)
    ignore = [*source.ignore, *source.structure.kept]
    if head_spec is None:
        ignore.insert(0, HEAD_MODULE)
    planes = planes_setting({name: spec.planes for name, spec in specs.items()}, head_spec)
    format_ = BWLAFormat(
        format_version=format_version(
            planes, embedding_source is not None, has_experts(specs), first.grouped
        ),
        planes=planes,
        input_activations=activation_args(first.bits),
        clip=first.clip,
        rank=first.rank,
        rotation={} if first.grouped else sizes,
        group_size=sizes if first.grouped else {},
        ignore=list(dict.fromkeys([*ignore, *namesakes(source, quantized, sizes, ignore)])),
        lm_head=head_args() if head_source and head_spec is None else None,
        embedding=head_args() if embedding_source else None,
        experts=ExpertsFormat(input_transform="first") if has_experts(specs) else None,
        provenance=provenance,
    )
    return ConversionPlan(
        specs,
        first.rank,
        fitting_rank,
        format_,
        head_source,
        embedding_source,
        source.tied_head,
        head_spec,
    )


def _linears(source: Source, bits: int, clip: float, planes: int) -> dict[str, LayerSpec]:
    """Return the specs of all linears to quantize, of rank 0."""
    specs: dict[str, LayerSpec] = {}
    for index in range(source.num_layers):
        for group, names in source.groups_of_layer(index):
            for name in names:
                out_features, in_features = source.entries[f"{name}.weight"].shape
                sizes = choose_rotation(in_features, group.preferred_rotation_groups)
                has_bias = f"{name}.bias" in source.entries
                specs[name] = LayerSpec(
                    out_features, in_features, *sizes, bits=bits, clip=clip, bias=has_bias, planes=planes
                )
    return specs


def make_plan(
    source: Source,
    rank: int | None,
    bits: int | None,
    clip: float | None,
    provenance: Provenance,
    head_bits: int | None = None,
    planes: int = 1,
    embedding_bits: int | None = None,
) -> ConversionPlan:
    """Choose rotation sizes and the rank for every linear of `source`.

    Args:
        source: the checked model.
        rank: rank of the low-rank correction; None for one within 1.16 bits per weight, everything counted
            (`bits.auto_rank`).
        bits: activation bits, 2..8 or 16; None for 6.
        clip: clipping ratio of the activations in (0, 1]; None for 1 until the recipe chooses others (`with_clips`).
        provenance: what the output records about the conversion.
        head_bits: bits of the head, see `choose_head`.
        planes: binary planes of every linear.
        embedding_bits: bits of the embedding, see `choose_embedding`.

    Raises:
        FormatError: `bits`, `clip`, `planes` or `rank` is out of range.
        SourceError: `rank` is larger than a linear, `head_bits` or `embedding_bits` is not supported, or there is no
            linear to quantize.
    """
    clip = 1.0 if clip is None else clip
    bits = DEFAULT_BITS if bits is None else bits
    specs = _linears(source, bits, clip, planes)
    if not specs:
        raise SourceError(
            f"{source.folder}: expected at least one linear to quantize, found that --ignore excludes all: ignore fewer"
        )
    fitting = largest_fitting_rank(specs, rank_budget(planes)) if rank is None else rank
    if rank is None:
        rank = auto_rank(fitting)
    for name, spec in specs.items():
        if rank > min(spec.out_features, spec.in_features):
            raise SourceError(
                f"{name}: expected a rank of at most {min(spec.out_features, spec.in_features)} for its "
                f"{spec.out_features} x {spec.in_features} weight, found {rank}: choose a smaller --rank, or auto"
            )
        specs[name] = replace(spec, rank=rank)
    head_bits = bits_unless_ignored(HEAD_MODULE, "--lm-head-bits", head_bits, source.ignore)
    embedding_bits = bits_unless_ignored(EMBEDDING_MODULE, "--embedding-bits", embedding_bits, source.ignore)
    embedding_source = choose_embedding(source, embedding_bits, head_bits)
    head_spec = head_in_planes(source, head_bits, rank, bits, clip)
    # A tied head is the 8-bit embedding, unless it has planes of its own.
    is_embedding = source.tied_head and embedding_source and head_spec is None
    head_source = None if is_embedding else choose_head(source, head_bits)
    return assemble(source, specs, fitting, provenance, head_source, embedding_source, head_spec)


def with_clips(plan: ConversionPlan, clips: Mapping[str, float]) -> ConversionPlan:
    """Return `plan` with the clipping ratios that the recipe chose.

    Args:
        plan: the plan.
        clips: clipping ratio of every linear, by module path, and of a head in binary planes.
    """
    if all(spec.clip == clips[name] for name, spec in plan.all_specs.items()):
        return plan
    specs = {name: replace(spec, clip=clips[name]) for name, spec in plan.all_specs.items()}
    head_spec = specs.pop(HEAD_MODULE, None)
    format_ = plan.format.model_copy(update={"clip": _settings(clips)})
    return replace(plan, specs=specs, head_spec=head_spec, format=format_)


def _settings(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the settings of linears by name with one entry for all experts of a layer, whose values are equal."""
    return {settings_name(name): value for name, value in values.items()}


def planes_setting(planes: Mapping[str, int], head: LayerSpec | None) -> int | dict[str, int]:
    """Return the numbers of planes as the config has them: one for all, or by the end of a linear's name.

    Args:
        planes: planes of every linear, by module path.
        head: spec of a head in binary planes, or None.
    """
    of_head = {} if head is None else {HEAD_MODULE: head.planes}
    counts = set(planes.values())
    if len(counts) > 1:
        return _settings({**planes, **of_head})
    if counts | set(of_head.values()) == counts:
        return counts.pop()
    return {kind_of(name): count for name, count in planes.items()} | of_head


def format_version(
    planes: int | dict[str, int], embedding: bool = False, experts: bool = False, grouped: bool = False
) -> Literal[1, 2]:
    """Return the first version of the format that knows all of these.

    Args:
        planes: as `planes_setting` returns them.
        embedding: whether the embedding is stored in 8 bits.
        experts: whether experts are stored in one bit.
        grouped: whether linears have scales for groups of columns.
    """
    return 1 if planes == 1 and not (embedding or experts or grouped) else 2


def with_planes(plan: ConversionPlan, planes: Mapping[str, int], rank: int, bits: int) -> ConversionPlan:
    """Return `plan` with the planes that were allocated.

    Args:
        plan: the plan.
        planes: planes of every linear, by module path; equal within an input group.
        rank: rank of the low-rank correction, also that of a head in binary planes.
        bits: activation bits.
    """
    specs = {
        name: replace(spec, planes=planes[name], rank=rank, bits=bits) for name, spec in plan.specs.items()
    }
    head_spec = None if plan.head_spec is None else replace(plan.head_spec, rank=rank, bits=bits)
    counts = planes_setting(planes, head_spec)
    changes: dict[str, object] = {
        "format_version": format_version(
            counts, plan.format.embedding is not None, plan.format.experts is not None
        ),
        "planes": counts,
        "rank": rank,
        "input_activations": activation_args(bits),
    }
    format_ = plan.format.model_copy(update=changes)
    return replace(plan, specs=specs, head_spec=head_spec, rank=rank, fitting_rank=rank, format=format_)
