"""Check a checkpoint by its headers, before an engine starts."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.files import INDEX_FILE, SINGLE_FILE, read_folder, read_json
from bwla_kernels.format.folder import check_folder
from bwla_kernels.format.model import check_model, check_plain_values
from torch import nn
from vllm.logger import init_logger

logger = init_logger("vllm.bwla")

ADVICE = "convert or download the model again"

SHARDED_STATE_FILES = "model-rank-*-part-*.safetensors"
"""Names of the files that vLLM's `save_sharded_state` writes."""

INPUT_SHARDED = ("o_proj", "down_proj")
"""Names of linears that every class of vLLM shards along their input; of others, the layer's class tells it later."""

OUTPUT_SHARDED = {"gate_proj": 1, "up_proj": 1, "gate_up_proj": 2}
"""Linears sharded along their output, and how many of them a stored tensor fuses; vLLM checks q, k and v itself."""


KV_B_PROJ = "kv_b_proj"
"""Matrix of multi-head latent attention, which vLLM splits into one for keys and one for values."""

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
"""Keys of a model's config on which the shapes of its tensors depend."""


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


def own_config(folder: Path, hf_config: Any) -> Any:
    """Return the transformers config that the checkpoint's config.json describes.

    Args:
        folder: the checkpoint.
        hf_config: the config as vLLM has it, to which `--hf-overrides` were applied.
    """
    raw = read_json(folder / "config.json")
    if raw.get("model_type") == getattr(hf_config, "model_type", None):
        # Not from_dict: transformers writes an infinity as an object, which only its reader of files understands.
        return type(hf_config).from_pretrained(folder)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def check_checkpoint(folder: Path, hf_config: Any = None) -> dict[str, LayerSpec]:
    """Check a checkpoint folder, and compare it with the model that its config.json describes.

    Args:
        folder: the checkpoint.
        hf_config: the model's transformers config, from `own_config`; if None, only the folder itself is checked.

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
    model = None if hf_config is None else _skeleton(hf_config)
    if model is not None and not check_model(model, specs, entries, folder):
        logger.info(
            "BWLA checks the sizes of this model while loading: transformers names its layers differently"
        )
    check_plain_values(folder, entries, specs)
    return specs


def changed_sizes(stored: Any, asked: Any) -> str | None:
    """Describe a difference in size between the checkpoint's own config and the one that vLLM was given.

    Args:
        stored: the model's transformers config as the checkpoint's config.json describes it.
        asked: the same with `--hf-overrides` applied.

    Returns: one sentence, or None where all sizes agree.
    """
    ours, theirs = stored.get_text_config(), asked.get_text_config()
    for key in SIZES:
        found, wanted = _size(ours, key), _size(theirs, key)
        if found is not None and wanted is not None and found != wanted:
            return (
                f"--hf-overrides: expected {key} {found}, as in the checkpoint's config.json, found {wanted}: the "
                "stored tensors do not fit another size, remove the override"
            )
    return None


def _size(config: Any, key: str) -> Any:
    """Return a size in a config; None if it has none, or one for each layer (Gemma 4's head_dim)."""
    try:
        return getattr(config, key, None)
    except Exception:  # transformers raises an error of its own where layers have different values
        return None


def check_tensor_parallel(specs: Mapping[str, LayerSpec], tp_size: int) -> None:
    """Check that every layer that is known to be sharded can be cut into `tp_size` equal parts.

    Other layers are checked one by one while vLLM builds the model (`BWLALinearMethod.create_weights`).

    Raises:
        FormatError: a layer whose rows or rotation groups `tp_size` does not divide.
    """
    for name, spec in specs.items():
        leaf = name.rpartition(".")[2]
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
    """Check that each of `tp_size` ranks can hold whole rotation groups of the layer called `name`.

    Raises:
        FormatError: they cannot.
    """
    if spec.rotation_groups % tp_size:
        raise FormatError(
            f"{name}: expected a tensor-parallel size that divides its {spec.rotation_groups} rotation groups, found "
            f"{tp_size}: choose another --tensor-parallel-size, or convert the model again with more rotation groups"
        )


def _skeleton(hf_config: Any) -> nn.Module | None:
    """Build the model on the meta device (shapes, no memory); return None if transformers has no such model.

    Raises:
        FormatError: transformers has such a model, but cannot build it from this config.
    """
    config = copy.deepcopy(hf_config)
    try:
        return _build_without_weights(config)
    except AssertionError:
        # vLLM's generic backend decorates transformers' classes for torch.compile. After that, in the same process,
        # they can only be built inside an engine.
        logger.info(
            "BWLA checks the sizes of this model while loading: this process has already served one of its class"
        )
        return None
    except Exception as error:  # any model code may run here
        reason = " ".join(str(error).split())
        if "Unrecognized configuration class" in reason:  # without a skeleton only this check is lost
            logger.info(
                "BWLA checks the sizes of this model while loading: transformers has no such language model"
            )
            return None
        raise FormatError(
            f"config.json: transformers cannot build this model ({reason:.200}): restore the config.json that "
            "bwla-convert wrote"
        ) from None


def _build_without_weights(config: Any) -> nn.Module:
    """Build the class of transformers that a config names, or else its causal language model, on the meta device."""
    own_class = _class_by_architecture(config)
    with torch.device("meta"):
        if own_class is not None:
            model: nn.Module = own_class(config)
        else:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(config)
    return model


def _class_by_architecture(config: Any) -> Any:
    """Return the class of transformers that config.json's `architectures` names; None if it is for other configs."""
    import transformers

    names = getattr(config, "architectures", None) or []
    found: Any = getattr(transformers, names[0], None) if len(names) == 1 else None
    is_for_config = getattr(found, "config_class", None) is type(config)
    return found if is_for_config and issubclass(found, transformers.PreTrainedModel) else None
