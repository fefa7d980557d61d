"""GGUF files as ordinary Hugging Face folders, kept in a cache.

The whole converter, transformers and vLLM read folders with a config.json and safetensors. A GGUF file is therefore
written as such a folder once, one tensor after another, before anything else happens to it.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bwla_converter.common.atomic_files import PARTIAL, move, whole_file
from bwla_converter.common.write_errors import WriteError, write_error
from bwla_converter.source.gguf_config import make_config
from bwla_converter.source.gguf_file import GGUFFile, open_gguf, part_paths
from bwla_converter.source.gguf_path import CACHE_VARIABLE, OnProgress, cache_folder, ignore_progress
from bwla_converter.source.gguf_tensors import Origin, read_tensor, tensor_origins
from bwla_converter.source.gguf_tokenizer import save_tokenizer
from bwla_converter.source.meta_model import build_meta_model
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import INDEX_FILE
from filelock import FileLock
from huggingface_hub import ModelCardData
from safetensors.torch import save_file
from transformers import PreTrainedModel

LAYOUT = 3
"""Increased when a folder in the cache would be written differently."""

LAYER = re.compile(r"(?:model\.layers|transformer\.h)\.\d+\.")
"""Start of the names of the tensors in decoder layers, in all architectures that are read from GGUF files."""

SHARD_BYTES = 2**31
"""Size from which a decoder layer is divided into several files, so that layers of many experts fit in memory."""

SPARE_BYTES = 64 * 2**20
"""Disk space for the tokenizer and the config.json, which are small beside the weights."""


def prepare(path: Path, on_progress: OnProgress = ignore_progress) -> Path:
    """Return an ordinary Hugging Face folder with the model of a GGUF file, in bfloat16.

    Weights of one bit or three values are in float16, which holds them without loss.

    The folder is in the cache, under the file's name and a digest of its path, size and modification time. The first
    call writes it, and it appears complete or not at all; later calls use it. Other processes that want the same folder
    wait until it is complete.

    Args:
        path: a GGUF file, the first one of a split model.
        on_progress: called while the folder is being written.

    Raises:
        SourceError: the file cannot be read, its model is not supported, or the cache lacks disk space.
    """
    cache = cache_folder() / "gguf"
    name = f"{path.stem}-{_identity(path)}"
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f".{name}.lock")
        lock.acquire()
    except OSError as cause:
        raise SourceError(
            f"{cache}: cannot be written ({cause.strerror}): name another folder in {CACHE_VARIABLE}"
        ) from None
    try:
        if not folder.is_dir():
            write_folder(path, folder, on_progress)
    finally:
        lock.release()
    return folder


def write_folder(path: Path, folder: Path, on_progress: OnProgress = ignore_progress) -> None:
    """Write the model of a GGUF file as an ordinary Hugging Face folder, in bfloat16: one decoder layer in each shard.

    Args:
        path: a GGUF file, the first one of a split model.
        folder: the folder to create. It appears complete or not at all.
        on_progress: called before the first tensor and after each one.

    Raises:
        SourceError: the file cannot be read, its model is not supported, `folder` exists, or there is too little disk
            space.
    """
    if folder.exists():
        raise SourceError(f"{folder}: already exists: choose another folder")
    file = open_gguf(path)
    config = make_config(file)
    _check_space(file, folder.absolute().parent)
    partial = folder.absolute().with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        config.save_pretrained(partial)
        model = build_meta_model(partial, config.to_dict())
        origins = tensor_origins(file, model)
        _write_json(partial / "generation_config.json", _generation_config(file))
        save_tokenizer(file, partial)
        _write_card(file, partial)
        _write_shards(file, partial, model, origins, lambda done, total: on_progress(folder, done, total))
        move(partial, folder)
    except (OSError, WriteError) as cause:
        problem = write_error(cause, folder)
        if problem is None:
            raise
        raise SourceError(
            f"{folder}: could not be written ({problem.reason}): expected {_needed(file) / 1e9:.1f} GB of free disk "
            f"space for {path.name} in bfloat16: {problem.advice}, or name another folder in {CACHE_VARIABLE}"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _identity(path: Path) -> str:
    """Return a digest of where a model's files are, and of their sizes and times."""
    facts = [str(LAYOUT), version("gguf"), version("transformers")]
    for part in part_paths(path):
        status = part.stat()
        facts.append(f"{part.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _needed(file: GGUFFile) -> int:
    """Return the bytes of disk space that the model takes in bfloat16."""
    return sum(2 * int(tensor.n_elements) for tensor in file.tensors.values()) + SPARE_BYTES


def _check_space(file: GGUFFile, parent: Path) -> None:
    needed = _needed(file)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise SourceError(
            f"{parent}: expected {needed / 1e9:.1f} GB of free disk space for {file.path.name} in bfloat16, "
            f"found {free / 1e9:.1f} GB: free some, or name a folder on another disk in {CACHE_VARIABLE}"
        )


def _write_shards(
    file: GGUFFile,
    folder: Path,
    model: PreTrainedModel,
    origins: Mapping[str, Origin],
    on_progress: Callable[[int, int], None],
) -> None:
    """Write all tensors, each decoder layer and each other tensor into files of its own, and the index."""
    shards = _divide(origins)
    total = sum(origin.size for origin in origins.values())
    done, weight_map = 0, {}
    on_progress(done, total)
    for number, members in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in members:
            tensors[name] = read_tensor(file, origins[name], model).contiguous()
            weight_map[name] = shard
            done += tensors[name].numel()
            on_progress(done, total)
        with whole_file(folder / shard) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    total_size = sum(_bytes(origin) for origin in origins.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _divide(origins: Mapping[str, Origin]) -> list[list[str]]:
    """Return the names of the tensors of each file."""
    shards: dict[tuple[str, int], list[str]] = {}
    sizes: dict[str, int] = {}
    for name, origin in origins.items():
        match = LAYER.match(name)
        key = match[0] if match else name
        number = sizes.get(key, 0) // SHARD_BYTES
        sizes[key] = sizes.get(key, 0) + _bytes(origin)
        shards.setdefault((key, number), []).append(name)
    return list(shards.values())


def _bytes(origin: Origin) -> int:
    return origin.size * origin.dtype.itemsize


def _generation_config(file: GGUFFile) -> dict[str, Any]:
    """Return a generation_config.json: generation also ends at the token that ends a turn."""

    def token(kind: str) -> Any:
        return file.metadata.get(f"tokenizer.ggml.{kind}_token_id")

    ends = list(dict.fromkeys(end for end in (token("eos"), token("eot")) if end is not None))
    settings = {
        "bos_token_id": token("bos"),
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": token("padding"),
    }
    return {name: value for name, value in settings.items() if value is not None}


def _write_card(file: GGUFFile, folder: Path) -> None:
    """Write a model card with the licence and the languages, which the card of the converted model repeats."""
    keys = {
        "license": "license",
        "license_name": "license.name",
        "license_link": "license.link",
        "language": "languages",
    }
    known = {name: file.metadata.get(f"general.{key}") for name, key in keys.items()}
    data = ModelCardData(**{name: value for name, value in known.items() if value})
    text = f"---\n{data.to_yaml()}\n---\n\nThe model of `{file.path.name}`, dequantized to bfloat16.\n"
    with whole_file(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
