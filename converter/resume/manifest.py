"""manifest.json of a work folder: what is being converted, with what, and how far it has come."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bwla_converter.common.atomic_files import whole_file
from bwla_converter.options import LinearReport, Options
from bwla_kernels.errors import BWLAError
from pydantic import BaseModel, ConfigDict, ValidationError

VERSION = 1
NOT_COMPARED = (
    "model",
    "out",
    "overwrite",
    "resume",
    "restart",
    "max_memory",
    "device",
    "calibration",
    "report",
    "text_samples",
    "hub_repo",
)
"""Options that do not change the result; the model and the text are compared by their contents."""

FLAGS = {"bits": "--abits", "head_bits": "--lm-head-bits"}
"""Options whose flag is not called as they are."""


class WorkError(BWLAError):
    """A work folder cannot be used, or not as asked."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileMark(_Record):
    """A file as it was: bytes, time of change in nanoseconds, SHA-256."""

    size: int
    modified: int
    sha256: str


class StoredFile(_Record):
    """A file of the work folder and the SHA-256 it must have."""

    file: str
    sha256: str


class StateFile(StoredFile):
    """A part of a recipe's state: hidden states of that shape, or, without a name, a safetensors file."""

    tensor: str = ""
    shape: list[int] = []


class Inputs(_Record):
    """Everything that decides the result's bytes.

    Attributes:
        arguments: the options that matter, by their flags.
        code: `fingerprint.code_version`.
        machine: `fingerprint.machine`.
        calibration: what the recipe says of its text; empty without.
    """

    arguments: dict[str, Any]
    code: dict[str, str]
    machine: dict[str, str]
    calibration: dict[str, Any]


class LayerRecord(_Record):
    """A finished block.

    Attributes:
        shard: its tensors.
        layers, traces, statistics: what the report says of it, as plain data.
        state: the recipe's state after it; empty where it has none.
    """

    shard: StoredFile
    layers: list[LinearReport]
    traces: dict[str, dict[str, list[float]]]
    statistics: dict[str, Any] = {}
    state: list[StateFile] = []


class Manifest(_Record):
    """The whole file.

    Attributes:
        version: of this layout.
        inputs: what the conversion is made with.
        source: every file of the model that is read, by its name; empty until its values are checked.
        blocks: the finished blocks by their number, in decimal.
        finished: SHA-256 of every shard once all that follows the blocks is settled too; empty before.
        seconds: working time so far, of all sessions.
    """

    version: int
    inputs: Inputs
    source: dict[str, FileMark] = {}
    blocks: dict[str, LayerRecord] = {}
    finished: dict[str, str] = {}
    seconds: float = 0.0


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put a manifest in the place of the one before, in one step."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(manifest.model_dump(), indent=1) + "\n", encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest back.

    Raises:
        WorkError: it is damaged, or of another version of this layout.
    """
    advice = "add --restart to discard that work"
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
        where = ".".join(map(str, first["loc"]))
        raise WorkError(f"{path}: {where}: {first['msg']}: the file is damaged, {advice}") from None


def arguments_of(options: Options, **more: Any) -> dict[str, Any]:
    """The options that decide the result, by their flags, as JSON gives them back; `more` as it is.

    Of the calibration only its amounts: its text is compared by its hash.
    """
    table = {field.name: getattr(options, field.name) for field in fields(options)}
    amounts = asdict(options.calibration) if options.calibration else {}
    amounts.pop("source", None)
    named = {name: value for name, value in table.items() if name not in NOT_COMPARED} | amounts
    flags = {FLAGS.get(name, "--" + name.replace("_", "-")): value for name, value in named.items()}
    arguments: dict[str, Any] = json.loads(json.dumps({**flags, **more}))
    return arguments


def difference(before: Inputs, now: Inputs) -> str | None:
    """In one sentence, why what was begun with `before` cannot go on with `now`; None where it can."""
    found = _first_difference(before.arguments, now.arguments)
    if found:
        return f"it was begun with {found[0]} {_shown(found[1])}, now it is {_shown(found[2])}: give the same arguments"
    found = _first_difference(before.code, now.code)
    if found:
        what = "the project's own code" if found[0] == "sources" else f"version {found[1]} of {found[0]}"
        other = "which has changed since" if found[0] == "sources" else f"now it is {found[2]}"
        return f"it was begun with {what}, {other}: go back to that version"
    found = _first_difference(before.machine, now.machine)
    if found:
        advice = f"set OMP_NUM_THREADS={found[1]}" if found[0] == "threads" else "go on where it was begun"
        return (
            f"it was begun with {found[0]} {_shown(found[1])}, now it is {_shown(found[2])}, which would change "
            f"sums' last bits: {advice}"
        )
    found = _first_difference(before.calibration, now.calibration)
    if found:
        return (
            f"it was begun with another calibration text ({found[0]} {_shown(found[1])}, now {_shown(found[2])}): "
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
