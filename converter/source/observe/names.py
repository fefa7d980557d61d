"""Names of stored tensors and the parameters that transformers makes of them.

transformers 5 renames many tensors when it loads them, and joins some: the experts of a layer become one parameter. The
checkpoints on the Hub, and the loaders of vLLM, have the stored names, so the output keeps these.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

COMPUTED = "rotary_emb.inv_freq"
"""Suffix of a buffer that old checkpoints contain although models compute it themselves."""


class StoredNames:
    """The rules by which transformers reads the stored tensors of a model.

    Args:
        model: the model, usually on the meta device.

    Attributes:
        parameters: shape of every tensor of the model's state dict, by name.
        unused: regular expressions of stored tensors that transformers leaves out, such as those that predict
            several tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [rule for rule in transforms if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]
        self.parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._model = model  # some conversions ask it for the shape of a parameter, or its configuration
        self.unused = tuple(sorted(model._keys_to_ignore_on_load_unexpected or ()))

    @property
    def identical(self) -> bool:
        """Whether the stored tensors have the names of the parameters."""
        return not self._renamings and not self._converters

    def parameter(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that the stored tensor `name` becomes, or a part of.

        Returns: the parameter's name, which may not exist in the model, and the pattern of the conversion, or None for
            a tensor that is only renamed.
        """
        if self.identical:
            return name, None
        renamed: tuple[str, str | None] = rename_source_key(name, self._renamings, self._converters)
        return renamed

    def by_parameter(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return parameter of the model -> the stored tensors among `names` that it is made of."""
        found: dict[str, list[str]] = {}
        for name in names:
            for parameter in self._parameters_of(name):
                found.setdefault(parameter, []).append(name)
        return {parameter: stored for parameter, stored in found.items() if parameter in self.parameters}

    def _parameters_of(self, name: str) -> list[str]:
        """Return all parameters that the stored tensor `name` becomes, or parts of: several if it is divided."""
        parameter, pattern = self.parameter(name)
        if pattern is None:
            return [parameter]
        targets = next(rule.target_patterns for rule in self._converters if pattern in rule.source_patterns)
        return [parameter.replace(targets[0], target, 1) for target in targets]

    def position(self, name: str) -> int:
        """Return the place of the stored tensor `name` among those that one parameter is made of; 0 if it is alone."""
        pattern = self.parameter(name)[1]
        if pattern is None:
            return 0
        patterns = next(rule.source_patterns for rule in self._converters if pattern in rule.source_patterns)
        place: int = patterns.index(pattern)
        return place

    def is_unused(self, name: str) -> bool:
        """Return whether transformers leaves out the stored tensor `name`."""
        return any(re.search(pattern, name) for pattern in self.unused)

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that the stored `tensors` become, by transformers' own rules.

        Args:
            tensors: stored tensors by name; all those that a parameter is made of.
        """
        if self.identical:
            return dict(tensors)
        by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        parameters: dict[str, Tensor] = {}
        conversions: dict[str, WeightConverter] = {}
        for name in sorted(tensors, key=dot_natural_key):
            parameter, pattern = self.parameter(name)
            if pattern is None:
                parameters[parameter] = tensors[name]
                continue
            if parameter not in conversions:
                conversions[parameter] = deepcopy(by_pattern[pattern])
            conversions[parameter].add_tensor(parameter, name, pattern, tensors[name])
        for parameter, conversion in conversions.items():
            for name, tensor in conversion.convert(parameter, self._model, self._model.config).items():
                parameters[name] = tensor[0] if isinstance(tensor, list) else tensor
        return parameters


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the parameters that config.json ties: name -> name of the one that replaces it in transformers."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def stored_tensors(model: PreTrainedModel, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return every tensor that a checkpoint of `model` stores, by name and on the meta device.

    Args:
        model: the model.
        without: parameters that are not stored.
    """
    state = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict().items()
        if name not in without
    }
    stored: dict[str, Tensor] = revert_weight_conversion(model, state)
    return stored


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a checkpoint of `model` stores, by name."""
    return {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}


def stored_modules(names: StoredNames, parameters: Mapping[str, list[str]]) -> dict[str, str]:
    """Return module path in transformers' model -> its stored name, of the weights that are only renamed.

    Args:
        names: how the model's tensors are stored.
        parameters: parameter -> its stored tensors, from `by_parameter`.
    """
    modules = {}
    for parameter, stored in parameters.items():
        path, _, key = parameter.rpartition(".")
        name, _, stored_key = stored[0].rpartition(".")
        if len(stored) == 1 and key == stored_key == "weight" and names.parameter(stored[0])[1] is None:
            modules[path] = name
    return modules
