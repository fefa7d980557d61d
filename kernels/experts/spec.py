"""The sizes of one layer's experts, and the stacked tensors that a backend repacks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bwla_kernels.errors import BackendError, FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import expert_specs
from bwla_kernels.format.layer import ROW_TENSORS, TensorSpec, shape_problem
from torch import Tensor

SWIGLU_OAI = "swigluoai"
"""The activation of gpt-oss, by vLLM's name: g sigmoid(alpha g) (u + 1), where the gate and up are limited."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", SWIGLU_OAI)
"""Functions f in f(gate) * up, and gpt-oss's; a kernel knows them by their position here."""

LIMIT = 7.0
"""Limit of `SWIGLU_OAI` in gpt-oss."""

ALPHA = 1.702
"""Factor in the sigmoid of `SWIGLU_OAI` in gpt-oss."""


@dataclass(frozen=True)
class ExpertsSpec:
    """Sizes of E experts, each y = W2 (f(W1 x + b1) * (W3 x + b3)) + b2, which share two input transforms.

    The gate and up projections (W1, W3) of all experts read the layer's input, which is transformed once for each
    token. The down projections (W2) of all experts share one transform of the hidden values.

    Attributes:
        experts: E, on this rank.
        gate_up: gate and up of one expert as one linear: I rows of the gate, then I rows of up; reads H columns. Its
            `bias` and that of `down` are independent of each other.
        down: W2 of one expert: H rows, I columns.
        activation: f, one of `ACTIVATIONS`. `SWIGLU_OAI` is a function of both, see `reference.gated`.
        limit: of `SWIGLU_OAI`: the largest gate, and the largest magnitude of up; other activations have none.
        alpha: of `SWIGLU_OAI`.

    Raises:
        FormatError: at construction, if the sizes contradict each other.
    """

    experts: int
    gate_up: LayerSpec
    down: LayerSpec
    activation: str = "silu"
    limit: float = LIMIT
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise FormatError(f"a layer needs at least one expert, found {self.experts}")
        if self.gate_up.out_features != 2 * self.down.in_features:
            raise FormatError(
                f"gate and up must have twice as many rows as down has columns, found "
                f"{self.gate_up.out_features} and {self.down.in_features}"
            )
        if self.gate_up.in_features != self.down.out_features:
            raise FormatError(
                f"experts must return as many values as they read, found {self.down.out_features} and "
                f"{self.gate_up.in_features}"
            )
        if self.gate_up.grouped or self.down.grouped:
            raise FormatError(
                "experts have one scale for each row and plane, found scales for groups of columns"
            )
        if self.activation not in ACTIVATIONS:
            raise FormatError(
                f"expected an activation among {', '.join(ACTIVATIONS)}, found {self.activation!r}: "
                "exclude the experts with --ignore"
            )
        if not (0 < self.limit < math.inf and 0 < self.alpha < math.inf):
            raise FormatError(
                f"limit and alpha of the activation must be positive, found {self.limit:g} and {self.alpha:g}: "
                "exclude the experts with --ignore"
            )

    @property
    def hidden_size(self) -> int:
        """H, the width of the layer's input and output."""
        return self.gate_up.in_features

    @property
    def intermediate_size(self) -> int:
        """I, the rows of a gate."""
        return self.down.in_features


def stacked_specs(experts: int, spec: LayerSpec) -> dict[str, TensorSpec]:
    """Return the tensors of one projection of all experts.

    Those with one row for each output feature have the experts as their first axis; the input transform is that of a
    linear, because the experts share it.
    """
    return {
        name: TensorSpec((experts, *want.shape), want.dtypes) if name in ROW_TENSORS else want
        for name, want in expert_specs(spec).items()
    }


def expect_stacked(which: str, tensors: Mapping[str, Tensor], experts: int, spec: LayerSpec) -> None:
    """Check names, shapes and dtypes of one projection's stacked tensors; `which` names it in messages.

    Raises:
        BackendError: a tensor is missing or does not fit.
    """
    for name, want in stacked_specs(experts, spec).items():
        if name not in tensors:
            raise BackendError(f"{which}.{name}: expected a tensor {list(want.shape)}, found none")
        problem = shape_problem(want, tuple(tensors[name].shape), tensors[name].dtype)
        if problem:
            raise BackendError(f"{which}.{name}: {problem}")


def expect_routing(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, spec: ExpertsSpec) -> None:
    """Check the shapes of an application's arguments: x [M, H], topk_weights and topk_ids [M, top-k].

    Raises:
        BackendError: one of them does not fit.
    """
    if x.dim() != 2 or x.shape[1] != spec.hidden_size:
        raise BackendError(f"x: expected [M, {spec.hidden_size}], found {list(x.shape)}")
    for name, tensor in (("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        if tensor.dim() != 2 or tensor.shape[0] != len(x) or tensor.shape != topk_ids.shape:
            raise BackendError(f"{name}: expected [{len(x)}, top-k], found {list(tensor.shape)}")


def expert_tensors(tensors: Mapping[str, Tensor], expert: int) -> dict[str, Tensor]:
    """Return one expert's projection as the tensors of a linear."""
    return {name: tensor[expert] if name in ROW_TENSORS else tensor for name, tensor in tensors.items()}
