"""Describe a conversion before it starts: input groups by kind of decoder layer, sizes, memory, time, what stays."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from bwla_converter.checkpoint.dummy import config_source
from bwla_converter.common.bits import bits_per_weight, describe_planes, describe_rank
from bwla_converter.conversion import with_amounts, with_calibration
from bwla_converter.options import AUTO_RECIPE, Options
from bwla_converter.planning.budget import predict, size, usable_memory
from bwla_converter.planning.choose import choose_recipe, plan_conversion
from bwla_converter.planning.lossless import LosslessWeights
from bwla_converter.planning.plan import ConversionPlan, input_bytes
from bwla_converter.source.folder.locate import locate
from bwla_converter.source.model import Source, open_source
from bwla_kernels.errors import SourceError
from bwla_kernels.format.experts import settings_name
from bwla_kernels.format.tensors import runs_of


def describe_conversion(options: Options) -> str:
    """Describe the conversion that `options` ask for.

    Of the model, only config.json is read, and the weights of a few layers where the recipe depends on them.

    Raises:
        BWLAError: the model or the options cannot be used.
    """
    path = Path(options.model).expanduser()
    folder = path if path.is_dir() else locate(options.model)[0]
    options, source, weights = _open(options, folder)
    options = with_amounts(with_calibration(options), source, torch.device("cpu"))
    plan = plan_conversion(options, source, weights)
    lines = [
        *_summary(source, plan),
        *_layers(source, plan),
        *_kept(source, plan),
        _cost(source, plan, options),
    ]
    return "\n".join(lines)


def _open(options: Options, folder: Path) -> tuple[Options, Source, LosslessWeights | None]:
    """Return the options with the recipe, the model, and how its weights are stored without loss, if they can be.

    Raises:
        SourceError: the recipe needs the weights, and there are none.
    """
    if options.recipe in (AUTO_RECIPE, "lossless") and any(folder.glob("*.safetensors")):
        source = open_source(str(folder), options.ignore)
        options, weights = choose_recipe(options, source)
        return options, source, weights
    if options.recipe == "lossless":
        raise SourceError(
            f"{folder}: expected the model's weights, which decide how recipe lossless stores them, found no "
            "safetensors file: download them first"
        )
    recipe = "fast" if options.recipe == AUTO_RECIPE else options.recipe
    return replace(options, recipe=recipe), config_source(folder, options.ignore), None


def _summary(source: Source, plan: ConversionPlan) -> Iterator[str]:
    total = sum(math.prod(entry.shape) for entry in source.entries.values())
    yield (
        f"{source.structure.architecture}: {source.num_layers} decoder layers, {total:,} weights, {plan.weights:,} of "
        "them to quantize"
    )
    yield (
        f"{describe_rank(plan.rank, plan.fitting_rank)}, {plan.bits_per_weight:.3f} bits per quantized weight, "
        f"everything counted, {plan.format.bits}-bit activations"
    )
    yield f"size of the tensors: {size(input_bytes(source))}, after the conversion {size(plan.output_bytes(source))}"


def _layers(source: Source, plan: ConversionPlan) -> Iterator[str]:
    """Yield the input groups of each kind of decoder layer, with the layers of that kind."""
    kinds: dict[tuple[tuple[tuple[str, ...], str], ...], list[int]] = {}
    for index in range(source.num_layers):
        prefix = f"{source.structure.layer_name(index)}."
        groups = []
        for _, names in source.groups_of_layer(index):
            specs = {name: plan.specs[name] for name in names}
            rows = sum(spec.out_features for spec in specs.values())
            columns, bits = plan.specs[names[0]].in_features, bits_per_weight(specs)
            members = tuple(dict.fromkeys(settings_name(name).removeprefix(prefix) for name in names))
            groups.append((members, f"{rows} x {columns}, {bits:.3f} bits per weight"))
        kinds.setdefault(tuple(groups), []).append(index)
    for kind, indices in kinds.items():
        yield f"decoder layer{'s' if len(indices) > 1 else ''} {ranges(indices)}:"
        if not kind:
            yield "  nothing is quantized"
        for members, numbers in kind:
            yield f"  {', '.join(members)}: {numbers}"


def _kept(source: Source, plan: ConversionPlan) -> Iterator[str]:
    """Yield the bits of head and embedding, and what stays in 16 bits."""
    structure = source.structure
    for kind, name, stored in (
        ("embedding", structure.embedding, plan.embedding_source),
        ("head", structure.head, plan.head_source),
    ):
        if kind == "head" and plan.head_spec is not None:
            yield f"{kind} {name}: {describe_planes(plan.head_spec.planes)}"
            continue
        tied = kind == "head" and source.tied_head and stored is None
        yield f"{kind} {name}: " + ("the embedding" if tied else "8 bits" if stored else "16 bits")
    by_reason: dict[str, list[str]] = {}
    for name, reason in structure.kept.items():
        by_reason.setdefault(reason, []).append(name)
    if source.ignore:
        by_reason["--ignore"] = list(source.ignore)
    for reason, names in by_reason.items():
        yield f"in 16 bits: {', '.join(names)} ({reason})"


def _cost(source: Source, plan: ConversionPlan, options: Options) -> str:
    """Return the memory, disk space and time that the conversion is expected to need on this machine."""
    limit = options.max_memory or usable_memory()
    epochs = (options.tune_epochs, options.distill_epochs)
    return f"recipe {options.recipe}, " + str(
        predict(source, plan, options.recipe, options.calibration, limit, epochs=epochs)
    )


def ranges(indices: Sequence[int]) -> str:
    """Return ascending numbers as ranges: "0 to 2, 5" for 0, 1, 2, 5."""
    parts = (str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs_of(indices))
    steps = {second - first for first, second in pairwise(indices)}
    if len(steps) == 1 and len(indices) > 2 and steps != {1}:
        return f"{indices[0]}, {indices[1]} to {indices[-1]} in steps of {steps.pop()}"
    return ", ".join(parts)
