"""The report of a conversion as plain data: its inputs, cost and results. Written as JSON, and as a page by `page`."""

import json
import logging
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bwla_converter.checkpoint.contents import Contents, split_bytes
from bwla_converter.common.atomic_files import whole_file
from bwla_converter.common.versions import versions
from bwla_converter.report.samples import DEFAULT_SAMPLES, make_samples, samples_problem
from bwla_converter.source.model import Source

REPORT_FILE = "bwla_report.json"
PAGE_FILE = "bwla_report.html"
EVALUATION_TEXTS = {"wikitext2": "WikiText-2", "wikitext-2": "WikiText-2", "wiki.": "WikiText-2"}
"""Parts of the names of files with text of a dataset that is commonly used to measure perplexity."""


def peak_memory() -> dict[str, int]:
    """Return the peak memory of this process in bytes: resident, and allocated on GPUs if any was used."""
    peak = {"cpu": peak_resident_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu"] = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return peak


def peak_resident_bytes() -> int:
    """Return the peak of the resident memory of this process, in bytes.

    On Linux, `ru_maxrss` would include the memory of the process that started this one.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def calibration_warning(calibration: Mapping[str, object]) -> str | None:
    """Return a warning if the calibration text is of a common evaluation dataset; else None.

    Of the dataset itself the training split is used. What a file holds is only known by its name.
    """
    source = str(calibration.get("source", ""))
    name = Path(source).name
    advice = "Evaluate this model on other text too."
    if source == "wikitext2":
        return (
            "The calibration text is the training split of WikiText-2: the perplexity on WikiText-2's test split is "
            f"therefore optimistic. {advice}"
        )
    for mark, dataset in EVALUATION_TEXTS.items():
        if mark in name.lower():
            return (
                f"The calibration text, {name}, is text of {dataset} by its name: if so, the perplexity on {dataset} "
                f"is optimistic. {advice}"
            )
    return None


def build_report(
    summary: Mapping[str, Any],
    traces: Mapping[str, Mapping[str, list[float]]],
    statistics: Mapping[str, Any],
    contents: Contents,
    source: Source,
) -> dict[str, Any]:
    """Return the report as plain JSON data.

    Args:
        summary: the fields of `options.Summary`.
        traces: first linear of an input group -> name of an objective -> its value after each round.
        statistics: "weights": linear -> `statistics.Change`; "activations": first linear of an input group -> the
            same; as plain data; either may be missing.
        contents: the checkpoint that was written.
        source: the model that was read.
    """
    provenance = contents.format.provenance.model_dump()
    linears = contents.specs.keys()
    return {
        **summary,
        "architecture": source.structure.architecture,
        "provenance": provenance,
        "planes": sorted({spec.planes for spec in contents.specs.values()}),
        "weights_by_planes": summary["planes"],
        "planes_of_linears": {name: spec.planes for name, spec in contents.specs.items()},
        "activation_bits": contents.format.bits,
        "head_bits": contents.head_bits,
        "embedding_bits": contents.embedding_bits,
        "bits": {part: round(bits, 5) for part, bits in contents.bits.items()},
        "bytes": {"before": split_bytes(source.entries, linears), "after": dict(contents.bytes)},
        "memory": peak_memory(),
        "versions": versions(),
        "calibration_warning": calibration_warning(provenance["calibration"]),
        "traces": traces,
        "statistics": statistics,
    }


def add_samples(report: Mapping[str, Any], model: Path, bwla: Path, count: int | None) -> dict[str, Any]:
    """Return `report` with sample completions of both models, or with the reason why there are none.

    Args:
        report: from `build_report`.
        model: folder of the original.
        bwla: folder of the complete checkpoint.
        count: number of prompts; None for a few if the model is small.
    """
    problem = samples_problem(model, report["bytes_before"], count)
    if problem is not None:
        return {**report, "samples": [], "no_samples": problem}
    try:
        samples = make_samples(model, bwla, DEFAULT_SAMPLES if count is None else count)
    except Exception as cause:  # of any library; a failure here must not lose an hour of work
        reason = " ".join(str(cause).split()) or type(cause).__name__
        logging.getLogger(__name__).warning("no sample completions: %s", reason)
        return {**report, "samples": [], "no_samples": f"generating them failed ({reason:.200})"}
    return {**report, "samples": [asdict(sample) for sample in samples], "no_samples": None}


def report_json(report: Mapping[str, Any]) -> str:
    """Format the report as JSON with one line per entry of the first two levels."""

    def compact(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    def nested(value: object) -> str:
        if isinstance(value, Mapping) and value:
            lines = ",\n".join(f"  {compact(str(key))}: {compact(item)}" for key, item in value.items())
            return f"{{\n{lines}\n }}"
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            return "[\n" + ",\n".join(f"  {compact(item)}" for item in value) + "\n ]"
        return compact(value)

    body = ",\n".join(f" {compact(key)}: {nested(value)}" for key, value in report.items())
    return f"{{\n{body}\n}}\n"


def write_report(folder: Path, report: Mapping[str, Any], page: bool = True) -> None:
    """Write the report's data and, if `page` is set, its HTML page into `folder`."""
    texts = {REPORT_FILE: report_json(report)}
    if page:
        from bwla_converter.report.page import render_page  # imports matplotlib

        texts[PAGE_FILE] = render_page(report)
    for file, text in texts.items():
        with whole_file(folder / file) as partial:
            partial.write_text(text, encoding="utf-8")
