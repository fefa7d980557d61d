"""The conversion: check, then block by block read, quantize, write; then index, config and a final check."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bwla_converter.calibration import Calibration
from bwla_converter.checkpoint import CheckpointWriter, OutputError, atomic_output, check_output
from bwla_converter.plan import Plan, input_bytes, make_plan
from bwla_converter.recipes import check_recipe, make_recipe
from bwla_converter.source import Source, check_values, open_source
from bwla_kernels.format import tensor_specs, validate_layer
from bwla_kernels.format.folder import check_folder, read_folder, read_tensors
from bwla_kernels.format.head import HEAD_MODULE, HeadSpec, head_tensor_specs, validate_head
from bwla_kernels.format.schema import Provenance
from bwla_kernels.head import quantize_head
from torch import Tensor

REPORT_FILE = "bwla_report.json"
SHARD_BYTES = 4 * 2**30
"""Wished size of the shards that hold what is not quantized."""


@dataclass(frozen=True)
class Options:
    """What `bwla-convert` was asked for; see its --help."""

    model: str
    out: Path
    recipe: str = "paper"
    rank: int | None = None
    bits: int = 6
    clip: float = 1.0
    seed: int = 0
    overwrite: bool = False
    head_bits: int | None = None
    ignore: tuple[str, ...] = ()
    calibration: Calibration | None = None


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear; `error` is relative, see `group.GroupResult`."""

    name: str
    weights: int
    error: float


@dataclass(frozen=True)
class Summary:
    """What a conversion produced."""

    out: str
    rank: int
    bits_per_weight: float
    weights: int
    bytes_before: int
    bytes_after: int
    seconds: float
    layers: list[LayerReport]


class Listener:
    """What a front end may want to hear; the methods do nothing here."""

    def planned(self, source: Source, plan: Plan) -> None:
        """The model is found and its structure checked; `plan` is what will be done."""

    def checked(self, name: str) -> None:
        """The values of one weight are finite."""

    def quantizing(self) -> None:
        """Everything is checked; the work starts."""

    def quantized(self, layer: LayerReport) -> None:
        """One linear is done."""


def convert(options: Options, listener: Listener | None = None) -> Summary:
    """Convert a model; the output appears whole or not at all.

    Peak memory is one decoder block and the work space of its widest input group.

    Raises:
        BWLAError: bad input or output, before any work where that can be known; nothing that existed is touched.
    """
    listener = listener or Listener()
    started = time.monotonic()
    check_recipe(options.recipe, options.calibration)
    check_output(options.out, options.overwrite)
    source = open_source(options.model, options.ignore)
    if options.out.resolve() == source.folder.resolve():
        raise OutputError(
            f"{options.out}: is the model to convert, and would be replaced: choose another output"
        )
    recipe = make_recipe(options.recipe, source, options.calibration, options.seed)
    provenance = _provenance(options, source, recipe.calibration)
    plan = make_plan(source, options.rank, options.bits, options.clip, provenance, options.head_bits)
    check_space(options.out, plan.output_bytes(source))
    listener.planned(source, plan)
    check_values(source, plan.head_source, listener.checked)
    listener.quantizing()
    reports: list[LayerReport] = []
    traces: dict[str, dict[str, list[float]]] = {}
    with atomic_output(options.out, options.overwrite) as writer:
        shards = Shards(source)
        for index in range(source.num_blocks):
            block = source.read(source.names_of_block(index))
            tensors = dict(block)
            recipe.begin_block(index, block)
            for _, names in source.groups_of_block(index):
                weights = {name: tensors.pop(f"{name}.weight") for name in names}
                specs = {name: plan.specs[name] for name in names}
                result = recipe.quantize(weights, specs)
                for name in names:
                    tensors.update({f"{name}.{key}": value for key, value in result.tensors[name].items()})
                    reports.append(LayerReport(name, block[f"{name}.weight"].numel(), result.errors[name]))
                    listener.quantized(reports[-1])
                traces[names[0]] = result.traces
            tensors.update(recipe.end_block())
            writer.write_shard(shards.block_file(index), tensors)
            del block, tensors
        for file, names in shards.rest():
            tensors = source.read([name for name in names if not plan.is_replaced(name)])
            if plan.head_source in names:
                head = source.read([plan.head_source])[plan.head_source]
                tensors.update(quantized_head(head))
            writer.write_shard(file, tensors)
        writer.finish(source.folder, output_config(source, plan))
        writer.replace(recipe.finish(writer.folder))
        summary = Summary(
            out=str(options.out),
            rank=plan.rank,
            bits_per_weight=plan.bits_per_weight,
            weights=plan.weights,
            bytes_before=input_bytes(source),
            bytes_after=writer.total_size,
            seconds=round(time.monotonic() - started, 1),
            layers=reports,
        )
        _write_report(writer, summary, traces)
        verify(writer.folder)
    return summary


def verify(folder: Path) -> None:
    """Read a finished checkpoint back and check every quantized layer's tensors.

    Raises:
        FormatError: what is wrong, naming file and tensor.
    """
    entries = read_folder(folder)
    for name, spec in check_folder(folder, entries).items():
        stored = read_tensors(folder, entries, [f"{name}.{key}" for key in tensor_specs(spec)])
        validate_layer(name, {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items()}, spec)
    codes = entries.get(f"{HEAD_MODULE}.weight_int8")
    if codes is not None:
        head = HeadSpec(*codes.shape)
        stored = read_tensors(folder, entries, [f"{HEAD_MODULE}.{key}" for key in head_tensor_specs(head)])
        validate_head({key.removeprefix(f"{HEAD_MODULE}."): tensor for key, tensor in stored.items()}, head)


def quantized_head(weight: Tensor) -> dict[str, Tensor]:
    """The 8-bit head made from a head's or an embedding's weight, under its stored names."""
    return {f"{HEAD_MODULE}.{key}": value for key, value in quantize_head(weight).items()}


def output_config(source: Source, plan: Plan) -> dict[str, Any]:
    """config.json of the output: an 8-bit head is a tensor of its own, tied to nothing."""
    untied = {"tie_word_embeddings": False} if plan.head_source else {}
    return {**source.config, **untied, "quantization_config": plan.format.to_json()}


def _provenance(options: Options, source: Source, calibration: dict[str, object]) -> Provenance:
    return Provenance(
        base_model=options.model if source.revision else source.folder.resolve().name,
        revision=source.revision,
        recipe=options.recipe,
        seed=options.seed,
        bwla_version=version("bwla"),
        calibration=calibration,
    )


def check_space(out: Path, needed: int) -> None:
    """Refuse an output that the disk has no room for.

    Raises:
        OutputError: less free space than `needed` bytes and 2 % for headers.
    """
    free = shutil.disk_usage(out.absolute().parent).free
    if needed * 1.02 > free:
        raise OutputError(
            f"{out}: expected {needed / 1e9:.2f} GB of free disk space, found {free / 1e9:.2f} GB: free some space"
        )


def _write_report(writer: CheckpointWriter, summary: Summary, traces: Mapping[str, object]) -> None:
    report = {**asdict(summary), "traces": traces}
    report.pop("out")  # a checkpoint may be moved
    (writer.folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


class Shards:
    """Names of the output's files: one a block, then what is outside the blocks in files of about 4 GiB."""

    def __init__(self, source: Source) -> None:
        self._blocks = source.num_blocks
        self._rest: list[list[str]] = []
        size = SHARD_BYTES
        for name in source.names_outside_blocks():
            entry = source.entries[name]
            bytes_ = entry.dtype.itemsize
            for axis in entry.shape:
                bytes_ *= axis
            if size + bytes_ > SHARD_BYTES:
                self._rest.append([])
                size = 0
            self._rest[-1].append(name)
            size += bytes_

    def _file(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self._blocks + len(self._rest):05d}.safetensors"

    def block_file(self, index: int) -> str:
        """File of decoder block `index`."""
        return self._file(index)

    def rest(self) -> list[tuple[str, list[str]]]:
        """Files of what is outside the blocks, with the source's tensor names."""
        return [(self._file(self._blocks + number), names) for number, names in enumerate(self._rest)]
