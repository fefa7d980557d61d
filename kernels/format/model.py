"""Compare a checkpoint with the model that it is for, and check the values of unquantized tensors.

Loaders do not report such differences: vLLM skips its completeness check for quantized models, leaves a missing tensor
uninitialized and narrows an oversized one; transformers initializes a missing tensor randomly and only warns.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format.files import Entry, read_tensors
from bwla_kernels.format.layer import LayerSpec
from torch import nn

ADVICE = "convert or download the model again"
COMPUTED = "rotary_emb.inv_freq"
"""Suffix of a buffer that old checkpoints contain although models compute it themselves."""

ELEMENTS_AT_ONCE = 2**26
_LAYER_INDEX = re.compile(r"\.\d+\.")


def check_model(
    model: nn.Module, specs: Mapping[str, LayerSpec], entries: Mapping[str, Entry], folder: Path
) -> bool:
    """Compare a checkpoint with the model that its config.json describes.

    Args:
        model: the model as transformers builds it, unquantized, usually on the meta device.
        specs: the checkpoint's quantized linears, from `check_folder`.
        entries: its tensors.
        folder: where it is, for messages.

    Returns: whether the two could be compared; False where the model names its layers differently.

    Raises:
        FormatError: the first difference, naming the tensor.
    """
    modules = dict(model.named_modules())
    if not all(isinstance(modules.get(name), nn.Linear) for name in specs):
        return False
    problem = next(_model_problems(model, specs, entries, folder), None)
    problem = problem or tied_conflict(folder, entries, tied_names(model))
    if problem:
        raise FormatError(f"{problem}; {ADVICE}")
    return True


def check_plain_values(folder: Path, entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec]) -> None:
    """Check that all tensors outside the quantized linears (norms, embeddings) are finite; read them for it.

    Raises:
        FormatError: the first tensor that is not finite.
    """
    for name, entry in entries.items():
        if name.rpartition(".")[0] not in specs and entry.dtype.is_floating_point:
            tensor = read_tensors(folder, entries, [name])[name]
            if not_finite(tensor):
                raise FormatError(
                    f"{folder / entry.file}: {name}: expected finite values, found NaN or infinity; {ADVICE}"
                )


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the tensors that config.json ties: name -> name of the tensor that replaces it in transformers."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


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


def int8_name(name: str) -> str:
    """Return the name of the 8-bit codes that a head or an embedding stores instead of the tensor `name`."""
    return f"{name.rpartition('.')[0]}.weight_int8"


def not_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds NaN or infinity; checks it in pieces to limit memory use."""
    pieces = tensor.reshape(-1).split(ELEMENTS_AT_ONCE)
    return not all(bool(torch.isfinite(piece).all()) for piece in pieces)


def _model_problems(
    model: nn.Module, specs: Mapping[str, LayerSpec], entries: Mapping[str, Entry], folder: Path
) -> Iterator[str]:
    """Yield a description of each difference between the checkpoint and the model."""
    modules = dict(model.named_modules())
    config = getattr(model, "config", None)
    named = getattr(config, "architectures", None) or []
    if named and type(model).__name__ not in named:
        yield f"{folder / 'config.json'}: expected the architecture {type(model).__name__} by model_type, found {named}"
    tied = tied_names(model)
    for key, other in tied.items():
        head, embedding = int8_name(key), int8_name(other)
        if head in entries:
            yield (
                f"{folder / 'config.json'}: expected tie_word_embeddings false, because {head} is stored, found true"
            )
        if key in entries and embedding in entries:
            yield (
                f"{folder / entries[key].file}: {key}: expected no such tensor, because config.json ties the head to "
                f"{embedding} (tie_word_embeddings), found one"
            )
    for name, spec in specs.items():
        linear = modules[name]
        assert isinstance(linear, nn.Linear)
        stored, outlined = [spec.out_features, spec.in_features], [linear.out_features, linear.in_features]
        if stored != outlined:
            yield f"{folder}: {name}: expected the sizes {outlined} that config.json describes, found {stored}"
        if spec.bias != (linear.bias is not None):
            yield f"{folder}: {name}.bias: expected {_presence(not spec.bias)}, found {_presence(spec.bias)}"
    stored_kinds = {_LAYER_INDEX.sub(".*.", key) for key in entries}
    model_keys = model.state_dict().keys()
    for key, parameter in model.named_parameters():
        owner = key.rpartition(".")[0]
        if owner in specs or int8_name(key) in entries:
            continue  # `check_folder` has checked these
        expected = list(parameter.shape)
        if key in entries:
            if list(entries[key].shape) != expected:
                file, found = folder / entries[key].file, list(entries[key].shape)
                yield f"{file}: {key}: expected the shape {expected} that config.json describes, found {found}"
        elif key in tied:
            continue
        # A kind of tensor that no layer has on disk is named differently (fused experts), not missing.
        elif not _LAYER_INDEX.search(key) or _LAYER_INDEX.sub(".*.", key) in stored_kinds:
            yield f"{folder}: {key} is missing, expected shape {expected}"
        elif isinstance(modules[owner], nn.Linear):
            yield f"{folder}: {owner} is missing, expected its weight {expected} or its one-bit tensors"
    for key in entries:
        owner = key.rpartition(".")[0]
        known = key in model_keys or owner in specs or int8_name(key) in entries
        if not known and not key.endswith(COMPUTED):
            yield f"{folder / entries[key].file}: {key} is not a tensor of this model"


def _presence(has_bias: bool) -> str:
    return "a bias" if has_bias else "no bias"
