"""What config.json must say of the model for the stored tensors to fit, and the values of unquantized tensors.

Loaders do not report such differences: vLLM skips its completeness check for quantized models, leaves a missing tensor
uninitialized and narrows an oversized one; transformers initializes a missing tensor randomly and only warns.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format.files import Entry, each_tensor, read_tensors
from bwla_kernels.format.layer import LayerSpec

EXPERTS = ".experts."
"""Part of the names of the experts' tensors."""

ELEMENTS_AT_ONCE = 2**26

_SIZE = re.compile(
    r"(?:size|dims?|layers?|heads?|experts?|expert_num|rank|embd|inner|states?|conv|kernel|L_cache|width|channels|"
    r"ff|model|groups|expand|ssm|depth|headdim|replace|step|interval|period|offset|inputs?|blocks|ratio|mult)$"
)
"""End of the names of numbers, and of lists of numbers, on which shapes depend."""

_NO_SIZE = re.compile(r"chunk|window|token|max_|position|ngram|time_step|batch")
"""Part of the names of numbers that users may change: limits of length, above all."""

_SWITCH = re.compile(r"bias|qk_(?:layer)?norm|k_eq_v|double_wide|^tie_word_embeddings$")
_KIND = re.compile(r"_act$|activation|^model_type$|pattern$")
_KINDS = re.compile(r"^architectures$|(?:^|_)types?$")


def config_values(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the values of a config.json on which names and shapes of the model's tensors depend.

    Args:
        config: the contents of config.json.
        defaults: the same as transformers completes it; null in config.json leaves the choice to transformers.

    Returns: the values by key. Keys of configs inside this one follow its key and a dot: `vision_config.hidden_size`.
    """
    values: dict[str, Any] = {}
    for key, value in sorted({**(defaults or {}), **config}.items()):
        if isinstance(value, Mapping):
            if key.endswith("_config") and key != "quantization_config":
                inner = (defaults or {}).get(key)
                nested = config_values(value, inner if isinstance(inner, Mapping) else None)
                values.update({f"{key}.{name}": found for name, found in nested.items()})
        elif _describes_shapes(key, value):
            values[key] = value
    return values


def config_problem(values: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> str | None:
    """Describe the first value of a config.json that is not what it was when the tensors were written.

    Args:
        values: those that it had, from `config_values`. A key that config.json lacks is no problem: libraries that
            save a config leave out defaults.
        config: the contents of config.json.
        path: where it is, for the message.
    """
    for key, wanted in values.items():
        *outer, last = key.split(".")
        inner: Any = config
        for name in outer:
            inner = inner.get(name) if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or last not in inner:
            continue
        found = inner[last]
        if type(found) is not type(wanted) or found != wanted:
            return (
                f"{path}: expected {key} {_short(wanted)}, as when the tensors were written, found {_short(found)}: "
                "restore this value"
            )
    return None


def changed_size(values: Mapping[str, Any], config: Any) -> tuple[str, int, int] | None:
    """Compare sizes with a loaded config; return key, expected and found value of the first that differs.

    Args:
        values: from `config_values`.
        config: a config object, such as transformers', with the defaults and changes that a loader applied.
    """
    for key, wanted in values.items():
        found = config
        try:
            for name in key.split("."):
                found = getattr(found, name, None)
        except Exception:  # transformers raises an error of its own where layers have different values
            continue
        if type(wanted) is type(found) is int and wanted != found:
            return key, wanted, found
    return None


def check_plain_values(folder: Path, entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec]) -> None:
    """Check that the tensors outside the quantized linears (norms, embeddings) are finite; read them for it.

    Experts in 16 bits are not read: they are most of such a model, and the loader would read them a second time.

    Raises:
        FormatError: the first tensor that is not finite.
    """
    plain = [
        name
        for name, entry in entries.items()
        if name.rpartition(".")[0] not in specs and EXPERTS not in name and entry.dtype.is_floating_point
    ]
    for name, tensor in each_tensor(folder, entries, plain):
        if not_finite(tensor):
            raise FormatError(
                f"{folder / entries[name].file}: {name}: expected finite values, found NaN or infinity; convert or "
                "download the model again"
            )


def tied_conflict(folder: Path, entries: Mapping[str, Entry], tied: Mapping[str, str]) -> str | None:
    """Describe a stored tensor that config.json ties to one with different values; return None if there is none.

    Every loader would silently drop one of the two.

    Args:
        folder: the checkpoint.
        entries: its tensors.
        tied: name of a tensor -> name of the tensor that replaces it.
    """
    for name, other in tied.items():
        if name in entries and other in entries:
            stored = read_tensors(folder, entries, [name, other])
            if not torch.equal(stored[name], stored[other]):
                return (
                    f"{name} differs from {other}, to which config.json ties it (tie_word_embeddings): "
                    "restore config.json"
                )
    return None


def not_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds NaN or infinity; checks it in pieces to limit memory use."""
    pieces = tensor.reshape(-1).split(ELEMENTS_AT_ONCE)
    return not all(bool(torch.isfinite(piece).all()) for piece in pieces)


def _describes_shapes(key: str, value: Any) -> bool:
    """Return whether shapes, or names, may depend on a value with this key."""
    if isinstance(value, bool):
        return bool(_SWITCH.search(key))
    if isinstance(value, int):
        return bool(_SIZE.search(key)) and not _NO_SIZE.search(key)
    if isinstance(value, str):
        return bool(_KIND.search(key))
    if not isinstance(value, list) or not value:
        return False
    if all(type(item) is int for item in value):
        return bool(_SIZE.search(key)) and not _NO_SIZE.search(key)
    # Kinds of decoder layers say nothing where all are of one kind.
    varies = key == "architectures" or any(item != value[0] for item in value)
    return varies and all(isinstance(item, str) for item in value) and bool(_KINDS.search(key))


def _short(value: Any) -> str:
    return f"{value!r:.80}"
