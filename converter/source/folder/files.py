"""Which files beside a model's weights belong to it, and why the others are left out.

Everything belongs to a model that is not a weight, unless there is a reason. The same rule decides what is copied from
a folder and what is downloaded from the Hub, so it needs nothing but paths and sizes.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from bwla_kernels.errors import FormatError, SourceError
from bwla_kernels.format.files import read_json

WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".ggmf", ".h5", ".hdf5", ".msgpack", ".ot",
    ".onnx", ".onnx_data", ".tflite", ".pb", ".npz", ".npy", ".pkl", ".pickle", ".joblib", ".distcp", ".nemo",
    ".mlmodel", ".engine", ".llamafile", ".dduf", ".keras", ".mar", ".tensors", ".pdparams", ".pte", ".litertlm",
}  # fmt: skip
"""Suffixes of weights and of whole models in other formats."""

CODE = {".py", ".pyc", ".pyx", ".so", ".dll", ".dylib", ".cu", ".cpp"}
"""Suffixes of code. The supported models need none of their own, and nobody should have to trust it."""

OTHER_FORMATS = {
    "original", "consolidated", "onnx", "openvino", "coreml", "gguf", "ggml", "metal", "mlx", "tflite", "tensorrt",
    "tf", "flax", "executorch", "qnn",
}  # fmt: skip
"""Names of folders with the same model in another format."""

SCRATCH = {"__pycache__", "node_modules", "wandb", "runs", "lost+found"}
"""Names of folders with files of other programs."""

UNFINISHED = {".partial", ".incomplete", ".part", ".crdownload", ".aria2", ".tmp", ".lock", ".swp", ".bak"}
"""Suffixes of files that another program has not finished, or has replaced."""

WRITTEN = {
    "config.json",
    "README.md",
    "bwla_calibration.jsonl",
    "bwla_hashes.json",
    "bwla_report.json",
    "bwla_report.html",
}
"""Files that the conversion writes itself."""

OTHER_SETTINGS = {
    "adapter_config.json": "describes an adapter",
    "params.json": "describes weights in another format",
    "hf_quant_config.json": "describes another quantization",
    "quantize_config.json": "describes another quantization",
    "quant_config.json": "describes another quantization",
}
"""Files that loaders take for a description of the weights beside them, and what they describe instead."""

MODULES_FILE = "modules.json"
"""sentence-transformers' list of the modules of a model."""

_MODULE = re.compile(r"\d+_\w+/")
"""Folders of the modules that sentence-transformers adds to a model, like "2_Dense/", some with weights."""

LARGE = 100 * 10**6
"""Size in bytes from which a file is not taken for a part of a tokenizer, a licence or a setting."""

CODE_KEYS = ("auto_map", "custom_pipelines")
"""Keys of settings that name classes in files of code."""

MAX_LISTED = 5
_INDEX = re.compile(r"(\.safetensors|\.bin|\.h5|\.msgpack)\.index(\.[\w-]+)?\.json$")
_MODEL_SETTINGS = re.compile(r"config\.json$|\.index\.json$|^params\.json$|^trainer_state\.json$")


@dataclass(frozen=True)
class Selection:
    """The files of a folder or a repository, by paths with slashes, relative to it.

    Attributes:
        kept: files that belong to the model, its weights and config.json not included.
        left_out: the other files and folders, the latter with a slash at the end -> the reason.
    """

    kept: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def select_files(sizes: Mapping[str, int]) -> Selection:
    """Decide which of these files belong to a model beside its weights.

    Args:
        sizes: size in bytes of every file, by its path with slashes.
    """
    selection = Selection()
    others = _folders_of_other_weights(sizes)
    for path in sorted(sizes):
        folders = [f"{parent}/" for parent in reversed(PurePosixPath(path).parents) if str(parent) != "."]
        is_module = MODULES_FILE in sizes and bool(folders) and _MODULE.fullmatch(folders[0]) is not None
        for folder in folders:
            reason = folder_reason(folder)
            if reason is None and folder in others and not is_module:
                reason = "holds other weights"
            if reason is not None:
                selection.left_out[folder] = reason
                break
        else:
            reason = file_reason(path, sizes[path])
            if reason is None or (is_module and path.endswith(".safetensors")):
                selection.kept.append(path)
            else:
                selection.left_out[path] = reason
    return selection


def _folders_of_other_weights(sizes: Mapping[str, int]) -> set[str]:
    """Return the folders inside of a model's that hold weights and the settings that go with them."""
    held: dict[str, set[str]] = {}
    for path in sizes:
        folder, slash, name = path.rpartition("/")
        if slash and is_weight(name):
            held.setdefault(f"{folder}/", set()).add("weights")
        elif slash and _MODEL_SETTINGS.search(name):
            held.setdefault(f"{folder}/", set()).add("settings")
    return {folder for folder, kinds in held.items() if len(kinds) == 2}


def folder_reason(folder: str) -> str | None:
    """Return the reason why a folder is left out by its name alone; None if it is not."""
    name = PurePosixPath(folder).name
    if name.startswith("."):
        return "hidden"
    if name.lower() in OTHER_FORMATS:
        return "the model in another format"
    if name in SCRATCH:
        return "written by another program"
    return "an unfinished conversion" if name.endswith(".work") else None


def file_reason(path: str, size: int = 0) -> str | None:
    """Return the reason why a file is left out; None if it belongs to the model."""
    name, suffix = PurePosixPath(path).name, PurePosixPath(path).suffix.lower()
    if name.startswith("."):
        return "hidden"
    if is_weight(name):
        return "weights"
    if suffix in CODE:
        return "code"
    if suffix in UNFINISHED or name.endswith("~"):
        return "temporary"
    if path in WRITTEN:
        return "written by the conversion"
    if path in OTHER_SETTINGS:
        return OTHER_SETTINGS[path]
    return f"larger than {LARGE // 10**6} MB" if size > LARGE else None


def is_weight(name: str) -> bool:
    """Return whether a file holds weights, or is the index of such files, by its name."""
    suffixes = ["", *(suffix.lower() for suffix in PurePosixPath(name).suffixes)]
    is_external = suffixes[-1] == ".data" and suffixes[-2] in WEIGHTS  # model.onnx.data
    return suffixes[-1] in WEIGHTS or is_external or _INDEX.search(name) is not None


def list_files(folder: Path) -> dict[str, int]:
    """Return the size of every file below `folder`, by its path with slashes; links are followed.

    Folders that are left out by their name are not entered; "name/*" stands for their files.

    Raises:
        SourceError: a link that belongs to the model leads nowhere, or a file cannot be read.
    """
    return dict(_walk(folder, "", {os.path.realpath(folder)}))


def _walk(folder: Path, prefix: str, above: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the files below `folder`; the real paths of the folders `above` it end circular links."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as cause:
        raise SourceError(f"{folder}: cannot be read ({cause.strerror}): check its permissions") from None
    for entry in entries:
        path = prefix + entry.name
        try:
            mode, size = entry.stat().st_mode, entry.stat().st_size
        except OSError as cause:
            if file_reason(path) is None and folder_reason(path) is None:
                raise SourceError(
                    f"{folder / entry.name}: expected a file, found a link that cannot be followed "
                    f"({cause.strerror}): download the model again, or remove the link"
                ) from None
            continue
        real = os.path.realpath(entry.path)
        if stat.S_ISDIR(mode):
            if folder_reason(path) is not None:
                yield f"{path}/*", 0
            elif real not in above:
                yield from _walk(folder / entry.name, f"{path}/", above | {real})
        elif stat.S_ISREG(mode):
            if file_reason(path, size) is None and not os.access(entry.path, os.R_OK):
                raise SourceError(
                    f"{folder / entry.name}: expected a file that can be read, found one that may not be: "
                    "check its permissions"
                )
            yield path, size


def files_beside(folder: Path) -> Selection:
    """Decide which files beside the weights belong to the model in `folder`.

    Raises:
        SourceError: as `list_files`.
    """
    return select_files(list_files(folder))


def beside_bytes(folder: Path) -> int:
    """Return the size of the files that belong to the model in `folder` beside its weights."""
    return sum((folder / path).stat().st_size for path in files_beside(folder).kept)


def describe_left_out(selection: Selection) -> str | None:
    """Name the files that are left out for another reason than being weights, hidden, temporary, or written anew."""
    expected = ("weights", "hidden", "temporary", "written by the conversion")
    listed = [f"{path} ({reason})" for path, reason in selection.left_out.items() if reason not in expected]
    more = f" and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
    return f"not copied: {', '.join(listed[:MAX_LISTED])}{more}" if listed else None


def settings_without_code(path: Path) -> dict[str, Any] | None:
    """Return a settings file without the keys that name code beside it; None if it can be copied as it is.

    Code of another repository ("owner/name--module.Class") is not missing, so it stays named.
    """
    if path.suffix != ".json" or path.stat().st_size > LARGE or b'"auto_map"' not in path.read_bytes():
        return None
    try:
        data = read_json(path)
    except FormatError:  # not settings, or not ours to judge
        return None
    if "auto_map" not in data or "--" in str(data["auto_map"]):
        return None
    return {key: value for key, value in data.items() if key not in CODE_KEYS}
