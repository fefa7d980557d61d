"""Write the documents of a finished checkpoint: report, model card and, last, the hashes of all files."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bwla_converter.calibration.self_text import text_lines
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.checkpoint.integrity import write_hashes
from bwla_converter.options import SELF, Options, Summary
from bwla_converter.quantize.group import GroupResult
from bwla_converter.report.data import add_samples, build_report, write_report
from bwla_converter.report.model_card import LOCAL_FOLDER, model_card, source_metadata, write_card
from bwla_converter.report.statistics import activation_statistics, weight_statistics
from bwla_converter.source.model import Source
from torch import Tensor

STATISTICS = ("weights", "activations")
CALIBRATION_FILE = "bwla_calibration.jsonl"
"""Calibration text that the model has written itself."""


def group_statistics(weights: Mapping[str, Tensor], result: GroupResult) -> dict[str, dict[str, Any]]:
    """Return the distributions of an input group's weights and inputs before and after quantization, as plain data.

    Args:
        weights: name of each linear -> its original weight [N_i, K].
        result: the group's quantization.
    """
    table: dict[str, dict[str, Any]] = {kind: {} for kind in STATISTICS}
    if not all("rotation_left" in tensors for tensors in result.tensors.values()):
        return table  # stored as they were
    for name, weight in weights.items():
        table["weights"][name] = asdict(weight_statistics(weight, *_transform(result.tensors[name])))
    if result.inputs is not None:
        first = next(iter(weights))
        change = activation_statistics(result.inputs, *_transform(result.tensors[first]))
        table["activations"][first] = asdict(change)
    return table


def write_documents(
    folder: Path,
    source: Source,
    options: Options,
    summary: Summary,
    traces: Iterable[Mapping[str, Any]],
    statistics: Iterable[Mapping[str, Mapping[str, Any]]],
) -> None:
    """Write report, model card, self-written calibration text and hashes into `folder`, a complete checkpoint.

    Args:
        folder: the checkpoint, before it is renamed to its final place.
        source: the model that was converted.
        options: the options of the conversion.
        summary: its result.
        traces: of each decoder layer, first linear of an input group -> name of an objective -> its values.
        statistics: of each decoder layer, the `group_statistics` of all its input groups.
    """
    contents = read_contents(folder)
    figures = asdict(summary)
    figures.pop("out")  # a checkpoint may be moved
    all_traces = {name: trace for part in traces for name, trace in part.items()}
    all_statistics: dict[str, dict[str, Any]] = {kind: {} for kind in STATISTICS}
    for part in statistics:
        for kind, changes in part.items():
            all_statistics[kind].update(changes)
    report = build_report(figures, all_traces, all_statistics, contents, source)
    if not source.loadable:
        report = {
            **report,
            "samples": [],
            "no_samples": "transformers does not know the original's tensor names",
        }
    elif options.report:
        report = add_samples(report, source.folder, folder, options.text_samples)
    write_report(folder, report, page=options.report)
    card = model_card(contents, source_metadata(source.folder), options.hub_repo or LOCAL_FOLDER)
    write_card(folder, card)
    if options.calibration is not None and options.calibration.source == SELF:
        lines = text_lines(options.calibration, source.folder)
        (folder / CALIBRATION_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_hashes(folder)


def _transform(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rotation's factors and the column scale."""
    return tensors["rotation_left"], tensors["rotation_right"], tensors["column_scale"]
