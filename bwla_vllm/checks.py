"""Check a checkpoint by its headers, before an engine starts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import EXPERT_LEAVES, expert_of
from bwla_kernels.format.files import INDEX_FILE, SINGLE_FILE, read_folder, read_json
from bwla_kernels.format.folder import check_folder
from bwla_kernels.format.model import changed_size, check_plain_values, config_values

ADVICE = "convert or download the model again"

SHARDED_STATE_FILES = "model-rank-*-part-*.safetensors"
"""Names of the files that vLLM's `save_sharded_state` writes."""

INPUT_SHARDED = ("o_proj", "down_proj")
"""Names of linears that every class of vLLM shards along their input; of others, the layer's class tells it later."""

OUTPUT_SHARDED = {"gate_proj": 1, "up_proj": 1, "gate_up_proj": 2}
"""Linears sharded along their output, and how many of them a stored tensor fuses; vLLM checks q, k and v itself."""

EXPERT_NAMES = dict(zip(EXPERT_LEAVES[1], EXPERT_LEAVES[0], strict=True))
"""Other names of an expert's linears -> the usual ones."""


KV_B_PROJ = "kv_b_proj"
"""Matrix of multi-head latent attention, which vLLM splits into one for keys and one for values."""


def local_folder(model: str, revision: str | None = None) -> str | None:
    """Return the folder with the weights of `model` on this machine.

    Args:
        model: a folder, or a Hub id to look up in the local Hub cache; nothing is downloaded.
        revision: the Hub revision.

    Returns: the folder, or None where weights are missing (a dummy load needs none, a Hub model may be downloaded
        later).

    Raises:
        FormatError: the cached index is not JSON.
    """
    path = Path(model)
    if path.is_dir():
        return model if any(path.glob("*.safetensors*")) else None

    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(file: str) -> Path | None:
        path = try_to_load_from_cache(model, file, revision=revision)
        return Path(path) if isinstance(path, str) else None

    try:
        config, index, single = cached("config.json"), cached(INDEX_FILE), cached(SINGLE_FILE)
        if config is None or (index is None and single is None):
            return None
        weight_map = read_json(index).get("weight_map") if index else None
        shards = set(weight_map.values()) if isinstance(weight_map, dict) else {SINGLE_FILE}
        complete = all(cached(str(shard)) is not None for shard in shards)
    except HFValidationError:  # neither a folder nor a Hub id: object storage, for example
        return None
    return str(config.parent) if complete else None


def check_checkpoint(folder: Path) -> dict[str, LayerSpec]:
    """Check a checkpoint folder against what its config.json says of it.

    Args:
        folder: the checkpoint.

    Returns: the full (unsharded) sizes of every quantized linear, by name.

    Raises:
        FormatError: the first problem found, naming file and tensor.
    """
    saved_by_vllm = sorted(folder.glob(SHARDED_STATE_FILES))
    if saved_by_vllm:
        raise FormatError(
            f"{saved_by_vllm[0]}: expected the files that bwla-convert wrote, found those of vLLM's "
            "save_sharded_state, which hold weights repacked for one machine: serve the converted folder"
        )
    entries = read_folder(folder)
    specs = check_folder(folder, entries)
    check_kv_b_proj(specs)
    check_plain_values(folder, entries, specs)
    return specs


def changed_sizes(folder: Path, asked: Any, values: Mapping[str, Any] | None = None) -> str | None:
    """Describe a difference in size between a checkpoint and the config that vLLM was given.

    Args:
        folder: the checkpoint.
        asked: the model's transformers config with `--hf-overrides` applied.
        values: what the tensors were written for, from the checkpoint's `quantization_config`; None where it does not
            say.

    Returns: one sentence, or None where all sizes agree.
    """
    path = folder / "config.json"
    changed = changed_size(config_values(read_json(path)) if values is None else values, asked)
    if changed is None:
        return None
    key, wanted, found = changed
    return (
        f"--hf-overrides: expected {key} {wanted}, as when the tensors were written, found {found}: they do not fit "
        f"another size, remove the override (or restore {key} in {path})"
    )


def check_tensor_parallel(
    specs: Mapping[str, LayerSpec], tp_size: int, expert_parallel: bool = False
) -> None:
    """Check that every layer that is known to be sharded can be cut into `tp_size` equal parts.

    Other layers are checked one by one while vLLM builds the model (`BWLALinearMethod.create_weights`).

    Args:
        specs: the quantized linears.
        tp_size: number of tensor-parallel ranks.
        expert_parallel: whether each rank has whole experts instead of a part of each.

    Raises:
        FormatError: a layer whose rows or rotation groups `tp_size` does not divide.
    """
    for name, spec in specs.items():
        in_expert = expert_of(name) is not None
        if in_expert and expert_parallel:
            continue
        leaf = name.rpartition(".")[2]
        leaf = EXPERT_NAMES.get(leaf, leaf) if in_expert else leaf
        rows = spec.out_features // OUTPUT_SHARDED.get(leaf, 1)
        if leaf in OUTPUT_SHARDED and rows % tp_size:
            raise FormatError(
                f"{name}: expected a tensor-parallel size that divides its {rows} rows, "
                f"found {tp_size}: choose another --tensor-parallel-size"
            )
        if leaf in INPUT_SHARDED:
            check_rotation_groups(name, spec, tp_size)


def check_kv_b_proj(names: Iterable[str]) -> None:
    """Check that `kv_b_proj` is not among the quantized linears.

    vLLM dequantizes it by multiplying with an identity matrix, which activations of a few bits would round.

    Raises:
        FormatError: it is.
    """
    for name in names:
        if name.rpartition(".")[2] == KV_B_PROJ:
            raise FormatError(
                f"{name}: expected 16 bits, because vLLM splits this matrix of multi-head latent attention in two, "
                f"found one bit: convert the model again with --ignore {KV_B_PROJ}"
            )


def check_rotation_groups(name: str, spec: LayerSpec, tp_size: int) -> None:
    """Check that each of `tp_size` ranks can hold whole groups of columns of the layer called `name`.

    Raises:
        FormatError: they cannot.
    """
    if spec.rotation_groups % tp_size:
        groups = "groups of columns with a scale" if spec.grouped else "rotation groups"
        otherwise = "" if spec.grouped else ", or convert the model again with more rotation groups"
        raise FormatError(
            f"{name}: expected a tensor-parallel size that divides its {spec.rotation_groups} {groups}, found "
            f"{tp_size}: choose another --tensor-parallel-size{otherwise}"
        )
