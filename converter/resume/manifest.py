"""manifest.json of a work folder: the inputs of a conversion, and the decoder layers that are finished."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bwla_converter.common.atomic_files import whole_file
from bwla_converter.options import LinearReport, Options
from bwla_kernels.errors import BWLAError
from pydantic import BaseModel, ConfigDict, ValidationError

VERSION = 2
NOT_COMPARED = (
    "model",
    "out",
    "overwrite",
    "resume",
    "restart",
    "max_memory",
    "threads",
    "device",
    "calibration",
    "report",
    "text_samples",
    "hub_repo",
)
"""Options that are not compared: they do not change the result, or, as the model and the calibration text, are compared
by their contents."""

FLAGS = {
    "bits": "--abits",
    "target_bits": "--bits",
    "target_loss": "--loss",
    "head_bits": "--lm-head-bits",
    "num_samples": "--num-calibration-samples",
}
"""Command-line flags of the options whose flag differs from their name."""


class WorkError(BWLAError):
    """The work folder cannot be used, or not with these options."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileMark(_Record):
    """Size in bytes, modification time in nanoseconds and SHA-256 of a source file."""

    size: int
    modified: int
    sha256: str


class StoredFile(_Record):
    """A file of the work folder and its expected SHA-256."""

    file: str
    sha256: str


class StateFile(StoredFile):
    """A file of a recipe's state: the raw hidden states called `tensor`, of shape `shape`, or a safetensors file where
    `tensor` is empty."""

    tensor: str = ""
    shape: list[int] = []


class Inputs(_Record):
    """Everything that determines the bytes of the result.

    Attributes:
        arguments: values of the options that matter, by command-line flag.
        code: see `fingerprint.code_version`.
        machine: see `fingerprint.machine`.
        calibration: the recipe's description of its calibration text; empty where it uses none.
    """

    arguments: dict[str, Any]
    code: dict[str, str]
    machine: dict[str, str]
    calibration: dict[str, Any]


class LayerReport(_Record):
    """What the report needs to know about a finished decoder layer.

    Attributes:
        linears: its quantized linears, in execution order.
        traces: first linear of an input group -> name of an objective -> its value after each round.
        statistics: "weights" or "activations" -> linear -> `report.statistics.Change`, as plain data.
        starved: linears of experts that few calibration tokens reached, see `quantize.moments.Moments.starved`.
    """

    linears: list[LinearReport]
    traces: dict[str, dict[str, list[float]]]
    statistics: dict[str, dict[str, Any]] = {}
    starved: list[str] = []


class LayerRecord(_Record):
    """A finished decoder layer.

    Attributes:
        shard: the file with its tensors.
        report: what is reported about it.
        state: the recipe's state after it; empty where the recipe has none.
    """

    shard: StoredFile
    report: LayerReport
    state: list[StateFile] = []


class Manifest(_Record):
    """Contents of manifest.json.

    Attributes:
        version: version of this schema.
        inputs: what the conversion was started with.
        source: every file of the model that is read, by name; empty until its values have been checked.
        sensitivities: first linear of each input group -> its `Sensitivity`, as numbers; empty until measured.
        layers: the finished decoder layers, by index in decimal.
        finished: SHA-256 of every shard, once no later step changes any of them; empty before.
        seconds: time spent so far, over all sessions.
    """

    version: int
    inputs: Inputs
    source: dict[str, FileMark] = {}
    sensitivities: dict[str, tuple[float, float]] = {}
    layers: dict[str, LayerRecord] = {}
    finished: dict[str, str] = {}
    seconds: float = 0.0


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest atomically, replacing the previous one."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(manifest.model_dump(), indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        WorkError: the file is damaged, or has another schema version.
    """
    advice = "add --restart to discard the unfinished conversion"
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text)["version"]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise WorkError(f"{path}: cannot be read ({cause}): {advice}") from None
    if version != VERSION:
        raise WorkError(f"{path}: expected version {VERSION}, found {version!r}: {advice}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as cause:
        first = cause.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise WorkError(f"{path}: {field}: {first['msg']}: the file is damaged, {advice}") from None


def arguments_of(options: Options, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that determine the result, by command-line flag, in the types that JSON preserves.

    Args:
        options: the options; of the calibration only the numbers, as its text is compared by hash.
        others: further entries to compare.
    """
    table = {field.name: getattr(options, field.name) for field in fields(options)}
    amounts = asdict(options.calibration) if options.calibration else {}
    for text in ("source", "written"):
        amounts.pop(text, None)
    compared = {name: value for name, value in table.items() if name not in NOT_COMPARED} | amounts
    flags = {FLAGS.get(name, "--" + name.replace("_", "-")): value for name, value in compared.items()}
    arguments: dict[str, Any] = json.loads(json.dumps({**flags, **others}))
    return arguments


def difference(before: Inputs, now: Inputs) -> str | None:
    """Explain in one sentence why a conversion started with `before` cannot be resumed with `now`; None if it can."""
    if changed := _first_difference(before.arguments, now.arguments):
        name, old, new = changed
        return f"it was started with {name} {_shown(old)}, now it is {_shown(new)}: give the same arguments"
    if changed := _first_difference(before.code, now.code):
        name, old, new = changed
        if name == "sources":
            return "bwla's own code has changed since it was started: go back to that version"
        return f"it was started with {name} {_shown(old)}, found {_shown(new)}: install that version again"
    if changed := _first_difference(before.machine, now.machine):
        name, old, new = changed
        advice = f"add --threads {old}" if name == "threads" else "resume it on the same machine"
        return (
            f"it was started with {name} {_shown(old)}, now it is {_shown(new)}, which changes the rounding of "
            f"sums: {advice}"
        )
    if changed := _first_difference(before.calibration, now.calibration):
        name, old, new = changed
        return (
            f"it was started with another calibration text ({name} {_shown(old)}, now {_shown(new)}): "
            "give the same text"
        )
    return None


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return key, before.get(key), now.get(key)
    return None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
