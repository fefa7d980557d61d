"""Compare a checkpoint with the model that it is for, and check the values of unquantized tensors.

Loaders do not report such differences: vLLM skips its completeness check for quantized models, leaves a missing tensor
uninitialized and narrows an oversized one; transformers initializes a missing tensor randomly and only warns.
"""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format.files import Entry, read_tensors
from bwla_kernels.format.head import INT8_SUFFIX
from bwla_kernels.format.layer import LayerSpec
from bwla_kernels.format.names import ParameterNames
from torch import nn

ADVICE = "convert or download the model again"
COMPUTED = "rotary_emb.inv_freq"
"""Suffix of a buffer that old checkpoints contain although models compute it themselves."""

EXPERTS = ".experts."
"""Part of the names of the experts' tensors."""

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
    names = ParameterNames(model)
    linears = names.of_modules(specs)
    modules = dict(model.named_modules())
    if not all(isinstance(modules.get(module), nn.Linear) for module in linears.values()):
        return False
    stored = _StoredTensors(names, linears, entries)
    problem = next(_model_problems(model, specs, stored, folder), None)
    tied = {stored.name_of(key): stored.name_of(other) for key, other in tied_names(model).items()}
    problem = problem or tied_conflict(folder, entries, tied)
    if problem:
        raise FormatError(f"{problem}; {ADVICE}")
    return True


def check_plain_values(folder: Path, entries: Mapping[str, Entry], specs: Mapping[str, LayerSpec]) -> None:
    """Check that the tensors outside the quantized linears (norms, embeddings) are finite; read them for it.

    Experts in 16 bits are not read: they are most of such a model, and the loader would read them a second time.

    Raises:
        FormatError: the first tensor that is not finite.
    """
    for name, entry in entries.items():
        is_plain = name.rpartition(".")[0] not in specs and EXPERTS not in name
        if is_plain and entry.dtype.is_floating_point:
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


def not_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds NaN or infinity; checks it in pieces to limit memory use."""
    pieces = tensor.reshape(-1).split(ELEMENTS_AT_ONCE)
    return not all(bool(torch.isfinite(piece).all()) for piece in pieces)


class _StoredTensors:
    """The tensors of a checkpoint by the parameters of the model that they become.

    Attributes:
        entries: the tensors, by stored name.
        linears: module path of each quantized linear, by stored name.
        int8: stored module path of the head and the embedding in 8 bits, by the parameter that they replace.
        plain: stored names of the unquantized tensors of each parameter.
        merged: parameters that are made from several tensors, or together with other parameters, with all parameters
            that are made together.
    """

    def __init__(
        self, names: ParameterNames, linears: Mapping[str, str], entries: Mapping[str, Entry]
    ) -> None:
        self.entries = entries
        self.linears = linears
        owners = [key.removesuffix(INT8_SUFFIX) for key in entries if key.endswith(INT8_SUFFIX)]
        self.int8 = {names.of(f"{owner}.weight")[0]: owner for owner in owners}
        self.plain: dict[str, list[str]] = {}
        self.merged: dict[str, list[str]] = {}
        for key in entries:
            owner, _, leaf = key.rpartition(".")
            if owner in linears or (owner in owners and leaf in ("weight_int8", "weight_scale")):
                continue
            parameter, is_merged = names.of(key)
            self.plain.setdefault(parameter, []).append(key)
            if is_merged:
                self.merged[parameter] = names.targets(parameter)
        self._kinds = {
            _LAYER_INDEX.sub(".*.", name): key for name, keys in self.plain.items() for key in keys[:1]
        }
        self._together = {name for targets in self.merged.values() for name in targets}

    def name_of(self, parameter: str) -> str:
        """Return the stored name of a parameter; one that is missing is named like that of another layer."""
        if parameter in self.plain:
            return self.plain[parameter][0]
        alike = self._kinds.get(_LAYER_INDEX.sub(".*.", parameter), parameter)
        indices = _LAYER_INDEX.findall(parameter)
        if len(indices) != len(_LAYER_INDEX.findall(alike)):
            return parameter
        return _LAYER_INDEX.sub(lambda _: indices.pop(0), alike)

    def holds(self, parameter: str) -> bool:
        """Return whether a parameter can be made from the unquantized tensors."""
        return parameter in self.plain or parameter in self._together

    def holds_kind(self, parameter: str) -> bool:
        """Return whether there is a tensor for the same parameter of any layer."""
        return _LAYER_INDEX.sub(".*.", parameter) in self._kinds

    def elements(self, parameter: str) -> int:
        """Return the number of values in the tensors that a parameter is made from."""
        return sum(math.prod(self.entries[key].shape) for key in self.plain[parameter])


def _model_problems(
    model: nn.Module, specs: Mapping[str, LayerSpec], stored: _StoredTensors, folder: Path
) -> Iterator[str]:
    """Yield a description of each difference between the checkpoint and the model."""
    modules = dict(model.named_modules())
    entries = stored.entries
    config = getattr(model, "config", None)
    named = getattr(config, "architectures", None) or []
    if named and type(model).__name__ not in named:
        yield f"{folder / 'config.json'}: expected the architecture {type(model).__name__} by model_type, found {named}"
    for key, other in tied_names(model).items():
        if key in stored.int8:
            yield (
                f"{folder / 'config.json'}: expected tie_word_embeddings false, because "
                f"{stored.int8[key]}{INT8_SUFFIX} is stored, found true"
            )
        if key in stored.plain and other in stored.int8:
            name = stored.name_of(key)
            yield (
                f"{folder / entries[name].file}: {name}: expected no such tensor, because config.json ties the head to "
                f"{stored.int8[other]}{INT8_SUFFIX} (tie_word_embeddings), found one"
            )
    for name, spec in specs.items():
        linear = modules[stored.linears[name]]
        assert isinstance(linear, nn.Linear)
        found, outlined = [spec.out_features, spec.in_features], [linear.out_features, linear.in_features]
        if found != outlined:
            yield f"{folder}: {name}: expected the sizes {outlined} that config.json describes, found {found}"
        if spec.bias != (linear.bias is not None):
            yield f"{folder}: {name}.bias: expected {_presence(not spec.bias)}, found {_presence(spec.bias)}"
    yield from _parameter_problems(model, stored, folder)
    yield from _unknown_tensors(model, stored, folder)


def _parameter_problems(model: nn.Module, stored: _StoredTensors, folder: Path) -> Iterator[str]:
    """Yield the parameters that are missing or have another shape than the stored tensors."""
    modules, parameters, tied = dict(model.named_modules()), dict(model.named_parameters()), tied_names(model)
    quantized = set(stored.linears.values())
    optional = _patterns(model, "_keys_to_ignore_on_load_missing")
    for key, parameter in parameters.items():
        owner = key.rpartition(".")[0]
        if owner in quantized or key in stored.int8:
            continue  # `check_folder` has checked these
        expected = list(parameter.shape)
        if key in stored.merged:
            targets = [parameters[name] for name in stored.merged[key] if name in parameters]
            wanted, found = sum(target.numel() for target in targets), stored.elements(key)
            if wanted != found:
                yield (
                    f"{folder}: {stored.name_of(key)} and the tensors beside it are merged into {key}: expected "
                    f"{wanted} values in all of them, found {found}"
                )
        elif key in stored.plain:
            entry = stored.entries[stored.plain[key][0]]
            if list(entry.shape) != expected:
                yield (
                    f"{folder / entry.file}: {stored.plain[key][0]}: expected the shape {expected} that config.json "
                    f"describes, found {list(entry.shape)}"
                )
        elif key in tied or stored.holds(key) or any(pattern.search(key) for pattern in optional):
            continue
        # A kind of tensor that no layer has on disk is named differently, not missing.
        elif not _LAYER_INDEX.search(key) or stored.holds_kind(key):
            yield f"{folder}: {stored.name_of(key)} is missing, expected shape {expected}"
        elif isinstance(modules[owner], nn.Linear):
            yield f"{folder}: {owner} is missing, expected its weight {expected} or its one-bit tensors"


def _unknown_tensors(model: nn.Module, stored: _StoredTensors, folder: Path) -> Iterator[str]:
    """Yield the stored tensors that the model does not have."""
    known = model.state_dict().keys()
    unused = _patterns(model, "_keys_to_ignore_on_load_unexpected")
    for parameter, keys in stored.plain.items():
        if parameter in known:
            continue
        for key in keys:
            if not key.endswith(COMPUTED) and not any(pattern.search(key) for pattern in unused):
                yield f"{folder / stored.entries[key].file}: {key} is not a tensor of this model"


def _patterns(model: nn.Module, attribute: str) -> list[re.Pattern[str]]:
    """Return the patterns of tensors that transformers does not report, of a model and the models inside it."""
    found = (getattr(module, attribute, None) or [] for module in model.modules())
    return [re.compile(pattern) for pattern in dict.fromkeys(chain.from_iterable(found))]


def _presence(has_bias: bool) -> str:
    return "a bias" if has_bias else "no bias"
