"""Load one-bit experts into transformers' models: linears take the place of its experts, whose weights are stacked."""

from collections.abc import Iterable, Mapping
from typing import Any

from bwla_converter.hf.expert_linears import ExpertLinears
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.source.observe.experts import DOWN, GATE_UP, Experts, Layout, is_experts
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import EXPERT_LEAVES, expert_of, experts_module, first_expert
from bwla_kernels.format.layer import INPUT_TRANSFORM
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter


class BWLAExpertLinear(BWLALinear):
    """A linear of an expert other than 0, which stores no input transform.

    Args:
        spec: sizes and quantization parameters.
        name: module path, for error messages.
        backend: as in `BWLALinear`.
        first: the same linear of expert 0, whose input transform it uses.
    """

    def __init__(self, spec: LayerSpec, name: str, backend: str | None, first: BWLALinear) -> None:
        super().__init__(spec, name, backend)
        for key in INPUT_TRANSFORM:
            if key in self._buffers:
                delattr(self, key)
        self._first = (first,)  # in a tuple, so that it is not a submodule

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the format, those of expert 0 included."""
        shared = {key: value for key, value in self._first[0].stored().items() if key in INPUT_TRANSFORM}
        return {**super().stored(), **shared}


def without_merging(conversions: Iterable[Any], quantizes: bool) -> list[Any]:
    """Return transformers' weight conversions without those that stack the tensors of experts.

    Args:
        conversions: the conversions of the model's class.
        quantizes: whether the checkpoint has experts in one bit.
    """
    joined = (GATE_UP, DOWN)
    return [
        rule
        for rule in conversions
        if not (
            quantizes
            and isinstance(rule, WeightConverter)
            and any(pattern.rpartition(".")[2] in joined for pattern in rule.target_patterns)
        )
    ]


def divide_quantized_experts(model: nn.Module, paths: Mapping[str, str]) -> None:
    """Replace transformers' experts by `ExpertLinears` where a checkpoint stores them in one bit.

    Args:
        model: the model, usually on the meta device.
        paths: stored name of each quantized linear -> its path in `model`, see `modules.module_paths`.

    Raises:
        FormatError: the model has no experts there, or another number of them.
    """
    numbers: dict[str, set[int]] = {}
    leaves: dict[str, set[str]] = {}
    for name, path in paths.items():
        number, above = expert_of(name), experts_module(path)
        if number is not None and above is not None:
            numbers.setdefault(above, set()).add(number)
            leaves.setdefault(above, set()).add(path.rpartition(".")[2])
    modules = dict(model.named_modules())
    for path, found in numbers.items():
        module = modules.get(path)
        count = getattr(module, GATE_UP).shape[0] if module is not None and is_experts(module) else 0
        if module is None or found != set(range(count)):
            raise FormatError(
                f"{path}: expected {count} experts, those of {type(model).__name__}, found {len(found)} in the "
                "checkpoint: load it with AutoModelForCausalLM"
            )
        names = next(row for row in EXPERT_LEAVES if set(row) == leaves[path])
        layout = Layout.of(module)
        _, hidden, inner = layout.sizes(getattr(module, GATE_UP))
        experts = Experts(path, path, names, count, hidden, inner, layout=layout)
        model.set_submodule(path, ExpertLinears(module, experts))


def quantized_linear(
    model: nn.Module, spec: LayerSpec, name: str, path: str, backend: str | None
) -> BWLALinear:
    """Return the quantized linear for the one called `name`, at `path` in `model`; those of expert 0 come first."""
    if expert_of(name) in (None, 0):
        return BWLALinear(spec, name, backend)
    first = model.get_submodule(first_expert(path))
    assert isinstance(first, BWLALinear)
    return BWLAExpertLinear(spec, name, backend, first)
