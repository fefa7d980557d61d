"""Recognize folders and repositories that hold something else than a model in safetensors, and say what to do."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from bwla_kernels.errors import BWLAError
from bwla_kernels.format.files import INDEX_FILE, SINGLE_FILE, read_json

ADAPTER_FILE = "adapter_config.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

TRAINING_STATE = ("training_args.", "optimizer.", "scheduler.", "rng_state", "scaler.")
"""How files are called that a trainer writes beside the weights."""

OTHER_WEIGHTS = {
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
    ".onnx": "an ONNX model",
    ".nemo": "a NeMo checkpoint",
    ".distcp": "a distributed checkpoint of PyTorch",
    ".npz": "NumPy weights",
    ".ckpt": "a checkpoint in pickle",
    ".pt": "a checkpoint in pickle",
}


def read_listing(folder: Path) -> list[str]:
    """Return the files of `folder`, and the models in its subfolders down to the second, by paths with slashes."""
    files = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    inner = [
        path for pattern in ("*/config.json", "*/*/config.json") for path in sorted(folder.glob(pattern))
    ]
    return [*files, *(path.relative_to(folder).as_posix() for path in inner)]


def other_kind(names: Collection[str], where: str, base_model: str = "") -> str | None:
    """Return a sentence about what these files are instead of a model in safetensors; None if they may be one.

    Args:
        names: paths of the files, with slashes.
        where: the folder or repository, for the message.
        base_model: the model that an adapter belongs to, if it is known.
    """
    if "config.json" in names and _has_weights(names):
        return None
    top = sorted(name for name in names if "/" not in name)
    found = next(_descriptions(where, top, names, base_model), None)
    return None if found is None else f"{where}: {found}"


def _has_weights(names: Collection[str]) -> bool:
    return SINGLE_FILE in names or INDEX_FILE in names


def missing_weights(names: Collection[str], where: str) -> str | None:
    """Return a sentence about a folder with a config.json and no weights; None if it has weights.

    Args:
        names: paths of the files, with slashes.
        where: the folder, for the message.
    """
    if _has_weights(names):
        return None
    inner = [str(PurePosixPath(name).parent) for name in names if name.endswith("/config.json")]
    top = sorted(name for name in names if "/" not in name)
    found = f"a model in {', '.join(inner[:3])}" if inner else _shown(top)
    advice = (
        "give that folder"
        if inner
        else "get the weights from the model's repository, or save it with transformers"
    )
    return f"{where}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found}: {advice}"


def _shown(top: list[str]) -> str:
    return ", ".join(top[:5]) + (f" and {len(top) - 5} more" if len(top) > 5 else "")


def _descriptions(where: str, top: list[str], names: Collection[str], base_model: str) -> Iterator[str]:
    """Yield sentences about what the files are, the most specific first."""
    has_weights = _has_weights(top)
    if ADAPTER_FILE in top and not has_weights:
        base = f"of {base_model} " if base_model else ""
        files = ", ".join(name for name in top if name.startswith("adapter_"))
        yield (
            f"expected a model, found an adapter {base}({files}): merge it into its model first, with PEFT's "
            "merge_and_unload() and save_pretrained(), and convert the result"
        )
    if "model_index.json" in top:
        yield "expected a language model, found a diffusers pipeline (model_index.json): it cannot be converted"
    if not has_weights:
        yield from _other_weights(where, top)
    if "config.json" in top:
        return
    inner = [str(PurePosixPath(name).parent) for name in names if name.endswith("/config.json")]
    if inner and not has_weights:
        yield f"expected a config.json, found one in {', '.join(inner[:3])}: give that folder"
    if has_weights:
        weights = SINGLE_FILE if SINGLE_FILE in top else INDEX_FILE
        yield f"expected a config.json beside {weights}, found none: get it from the model's repository"
    if not top:
        yield "expected a model, found no files: check the path"
    yield f"expected config.json and {SINGLE_FILE}, found {_shown(top)}: give the folder of a model"


def _other_weights(where: str, top: list[str]) -> Iterator[str]:
    """Yield sentences about weights that are not read."""
    top = [name for name in top if not name.startswith(TRAINING_STATE)]
    gguf = [name for name in top if name.endswith(".gguf")]
    if gguf:
        missing = SINGLE_FILE if "config.json" in top else "config.json"
        yield (
            f"expected a {missing}, found GGUF files: give one of them instead of the folder, for example "
            f"{where}/{gguf[0]}"
        )
    consolidated = [name for name in top if name.startswith("consolidated.")]
    if consolidated:
        yield (
            f"expected {SINGLE_FILE}, found weights in their maker's own format ({consolidated[0]}): give the version "
            "of the model for transformers, or convert it with transformers' script for this model"
        )
    shards = [name for name in top if _SHARD.fullmatch(name)]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    saved_by_vllm = [name for name in safetensors if name.startswith("model-rank-")]
    if saved_by_vllm:
        yield (
            f"expected {SINGLE_FILE}, found the files of vLLM's save_sharded_state ({saved_by_vllm[0]}): convert the "
            "model that was served"
        )
    elif shards:
        yield f"expected {INDEX_FILE} beside {shards[0]}, found none: get it from the model's repository"
    elif safetensors:
        yield (
            f"expected {SINGLE_FILE}, found {', '.join(safetensors[:3])}: if it is the whole model, rename it to "
            f"{SINGLE_FILE}"
        )
    pickled = [name for name in top if name.endswith((".bin", ".pth", ".bin.index.json"))]
    if pickled:
        yield (
            f"expected {SINGLE_FILE}, found {pickled[0]}, which is pickled and not opened: save the model as "
            "safetensors first, with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    for name in top:
        kind = OTHER_WEIGHTS.get(PurePosixPath(name).suffix)
        if kind is not None:
            yield f"expected {SINGLE_FILE}, found {kind} ({name}): save the model with transformers first"


def adapter_base(folder: Path) -> str:
    """Return the model that the adapter in `folder` belongs to; empty if it does not say."""
    try:
        return str(read_json(folder / ADAPTER_FILE).get("base_model_name_or_path") or "")
    except BWLAError:
        return ""
