"""Random but valid BWLA checkpoints of any configuration, to measure speed and memory without a model's weights.

Only the source's config.json (and tokenizer files, if there are any) is needed.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from bwla_converter.checkpoint.layout import Parts, check_space, int8_tensors, output_config
from bwla_converter.checkpoint.writer import atomic_output, check_output
from bwla_converter.options import Options
from bwla_converter.planning.disk import merging_bytes
from bwla_converter.planning.plan import ConversionPlan, make_plan
from bwla_converter.source.meta_model import build_meta_model
from bwla_converter.source.model import Source
from bwla_converter.source.observe.derive import is_tied, observe_structure
from bwla_converter.source.observe.names import StoredNames, stored_shapes
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, TensorSpec, tensor_specs
from bwla_kernels.format.experts import stored_specs
from bwla_kernels.format.folder import Entry, read_json
from bwla_kernels.format.head import HEAD_MODULE
from bwla_kernels.format.layer import INPUT_TRANSFORM
from bwla_kernels.format.schema import Provenance
from torch import Tensor

DUMMY_RECIPE = "dummy"


def config_source(folder: Path, ignore: tuple[str, ...] = ()) -> Source:
    """Return a source with the tensors of a model with this config.json, in bfloat16, but without files.

    Raises:
        SourceError: there is no config.json, or its architecture is not supported.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder}: expected a folder with a config.json, found none: check the path")
    config = read_json(folder / "config.json", SourceError)
    outline = build_meta_model(folder, config)
    names, shapes = StoredNames(outline), stored_shapes(outline)
    structure = observe_structure(outline, names, shapes, str(folder / "config.json"))
    tied = is_tied(outline)
    entries = {
        name: Entry("", shape, torch.bfloat16)
        for name, shape in shapes.items()
        if not (tied and name == f"{structure.head}.weight")
    }
    defaults = outline.config.to_dict()
    divided = structure.with_divided_experts(entries, ignore)
    return Source(folder, config, structure, divided, tied, ignore=ignore, names=names, defaults=defaults)


def random_layer(
    spec: LayerSpec, generator: torch.Generator, specs: Mapping[str, TensorSpec] | None = None
) -> dict[str, Tensor]:
    """Return a valid quantized linear with random signs and rotations; its output has the variance of its input.

    Args:
        spec: its sizes.
        generator: draws the values.
        specs: the tensors to return; None for all.
    """
    tensors = {}
    for key, tensor_spec in (tensor_specs(spec) if specs is None else specs).items():
        shape, dtype = tensor_spec.shape, tensor_spec.dtypes[0]
        if key == "weight_packed":
            tensors[key] = torch.randint(-(2**31), 2**31, shape, generator=generator).to(dtype)
        elif key in ("rotation_left", "rotation_right"):
            gaussian = torch.randn(shape, generator=generator)
            tensors[key] = torch.linalg.qr(gaussian).Q.to(dtype).contiguous()
        elif key == "column_scale":
            tensors[key] = torch.ones(shape, dtype=dtype)
        elif key == "weight_scale":
            tensors[key] = torch.full(shape, spec.in_features**-0.5, dtype=dtype)
        else:
            tensors[key] = (torch.randn(shape, generator=generator) * 0.01).to(dtype)
    return tensors


def plan_dummy(options: Options) -> tuple[Source, ConversionPlan]:
    """Return the source and the plan of a random checkpoint for the config.json in the folder `options.model`.

    Raises:
        BWLAError: the config or the options are invalid.
    """
    source = config_source(Path(options.model), options.ignore)
    provenance = Provenance(base_model=source.folder.resolve().name, recipe=DUMMY_RECIPE, seed=options.seed)
    return source, make_plan(
        source,
        options.rank,
        options.bits,
        options.clip,
        provenance,
        options.head_bits,
        options.planes,
        options.embedding_bits,
    )


def write_dummy(options: Options) -> ConversionPlan:
    """Write a random checkpoint for the config.json in the folder `options.model`, and return its plan.

    The linears of an input group get the same input transform, as the format requires.

    Raises:
        BWLAError: as `pipeline.convert`.
    """
    check_output(options.out, options.overwrite)
    source, plan = plan_dummy(options)
    needed = plan.output_bytes(source) + merging_bytes(plan.output_bytes(source), 0)
    check_space(options.out, needed)
    generator = torch.Generator().manual_seed(options.seed)
    with atomic_output(options.out, options.overwrite, needed) as writer:
        parts = Parts(source)
        for index in range(source.num_layers):
            writer.write_shard(parts.layer_file(index), _random_decoder_layer(source, plan, index, generator))
        for file, names in parts.rest():
            tensors = {name: _plain(source, name) for name in names if not plan.is_replaced(name)}
            for name in names:
                tensors.update(int8_tensors(plan, name, lambda name: _plain(source, name)))
                if plan.head_spec is not None and name == plan.head_source:
                    head = random_layer(replace(plan.head_spec, bias=False), generator)
                    tensors.update({f"{HEAD_MODULE}.{key}": value for key, value in head.items()})
            writer.write_shard(file, tensors)
        writer.finish(source.folder, output_config(source, plan, writer.entries))
        writer.merge_parts()
    return plan


def _random_decoder_layer(
    source: Source, plan: ConversionPlan, index: int, generator: torch.Generator
) -> dict[str, Tensor]:
    names = [name for name in source.names_of_layer(index) if not plan.is_replaced(name)]
    tensors = {name: _plain(source, name) for name in names}
    for _, members in source.groups_of_layer(index):
        shared: dict[str, Tensor] = {}
        for member in members:
            spec = plan.specs[member]
            layer = random_layer(spec, generator, stored_specs(member, spec))
            for key in INPUT_TRANSFORM:
                if key in layer:
                    layer[key] = shared.setdefault(key, layer[key]).clone()
            tensors.update({f"{member}.{key}": value for key, value in layer.items()})
    return tensors


def _plain(source: Source, name: str) -> Tensor:
    """Return a tensor that is not quantized: ones for norms, small noise for the rest."""
    entry = source.entries[name]
    if len(entry.shape) == 1 and name.endswith("norm.weight"):
        return torch.ones(entry.shape, dtype=entry.dtype)
    return torch.empty(entry.shape, dtype=entry.dtype).normal_(std=0.02)
