"""Map stored names to the parameters of a transformers model, as transformers does while it loads.

transformers 5 renames modules and merges experts into one parameter; the stored names stay those of the original.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn


class ParameterNames:
    """The names that a model has for stored tensors.

    Args:
        model: a transformers model, or any module, whose names are then the stored ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        self._prefix: str | None = None
        self._parameters = dict(model.state_dict())
        if not hasattr(model, "base_model_prefix"):
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        for transform in get_model_conversion_mapping(model):
            merges = isinstance(transform, WeightConverter)
            (self._converters if merges else self._renamings).append(transform)
        self._prefix = str(model.base_model_prefix) or None

    def of(self, stored: str) -> tuple[str, bool]:
        """Return the parameter made from the tensor called `stored`, and whether it is made from several."""
        if stored in self._parameters:
            return stored, False
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(
            stored, self._renamings, self._converters, self._prefix, self._parameters
        )
        return name, pattern is not None

    def of_modules(self, modules: Iterable[str]) -> dict[str, str]:
        """Return the module path in the model of each stored linear, by its stored name."""
        return {name: self.of(f"{name}.weight")[0].removesuffix(".weight") for name in modules}

    def targets(self, parameter: str) -> list[str]:
        """Return all parameters that are made together with `parameter` by one conversion, itself included."""
        for converter in self._converters:
            first, *others = converter.target_patterns
            if others and first in parameter:
                return [parameter, *(parameter.replace(first, other, 1) for other in others)]
        return [parameter]
