"""Experts as separate linears, in the place of transformers' experts, whose weights are stacked into tensors.

Everything that works on linears (hooks, replacing them by quantized ones) then works on those of the experts too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from bwla_converter.source.observe.experts import DOWN, GATE_UP, Experts, is_swiglu_oai
from bwla_kernels.experts.reference import swiglu_oai
from torch import Tensor, nn


class ExpertLinears(nn.Module):
    """Experts that compute what transformers' do, with one linear for each projection of each expert.

    The linears are called as the stored tensors are: `3.up_proj` belongs to expert 3.

    Args:
        module: transformers' experts. The linears share its weights.
        experts: how they are stored.
    """

    def __init__(self, module: nn.Module, experts: Experts) -> None:
        super().__init__()
        self.leaves, self.count, self.inner = experts.leaves, experts.count, experts.inner
        self.gating = _gating(module)
        layout = experts.layout
        gate_up, down = (
            weight.mT if layout.transposed else weight
            for weight in (getattr(module, GATE_UP).detach(), getattr(module, DOWN).detach())
        )
        biases = [getattr(module, f"{key}_bias").detach() for key in (GATE_UP, DOWN) if layout.bias]
        for number in range(self.count):
            expert = nn.Module()
            own = (
                (*layout.halves(both[number]), last[number])
                for both, last in ((gate_up, down), *([biases] if biases else []))
            )
            for leaf, *tensors in zip(self.leaves, *own, strict=True):
                expert.add_module(leaf, _linear(*tensors))
            self.add_module(str(number), expert)

    def is_down(self, leaf: str) -> bool:
        """Return whether the linears called `leaf` are the down projections."""
        return leaf == self.leaves[2]

    def linear(self, number: int, leaf: str) -> nn.Module:
        """Return a linear of the expert `number`."""
        return self.get_submodule(f"{number}.{leaf}")

    def hidden_values(self, number: int, x: Tensor) -> Tensor:
        """Return what the down projection of expert `number` reads, [M, I], for its inputs x [M, H]."""
        gate, up = (self.linear(number, leaf)(x) for leaf in self.leaves[:2])
        return self.gating(gate, up)

    def routed(self, top_k_index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each expert that is chosen, with the tokens that chose it and the places it has among their choices.

        Args:
            top_k_index: [M, top-k]. Numbers that are no expert's stand for none.
        """
        for number in top_k_index.unique().tolist():
            if 0 <= number < self.count:
                yield number, *torch.where(top_k_index == number)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute [M, H] -> [M, H]: the sum over each token's experts, times their weights.

        Args:
            hidden_states: [M, H].
            top_k_index: numbers of the experts [M, top-k].
            top_k_weights: their weights [M, top-k].
        """
        total = torch.zeros_like(hidden_states)
        for number, tokens, places in self.routed(top_k_index):
            values = self.hidden_values(number, hidden_states[tokens])
            output = self.linear(number, self.leaves[2])(values) * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, output.to(total.dtype))
        return total


def divide_experts(layer: nn.Module, experts: Experts | None) -> None:
    """Replace transformers' experts in a decoder layer by `ExpertLinears`, unless there are none to divide."""
    if experts is not None:
        layer.set_submodule(experts.path, ExpertLinears(layer.get_submodule(experts.path), experts))


def experts_around(layer: nn.Module, path: str) -> ExpertLinears | None:
    """Return the experts that hold the linear at `path` in a decoder layer; None for any other linear."""
    above = path.rpartition(".")[0].rpartition(".")[0]
    module: Any = layer.get_submodule(above) if above else None
    return module if isinstance(module, ExpertLinears) else None


def _gating(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function of gate and up that transformers' experts `module` compute."""
    if is_swiglu_oai(module):
        return swiglu_oai
    activation: Callable[[Tensor], Tensor] = module.act_fn  # type: ignore[assignment]
    return lambda gate, up: activation(gate) * up


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(
            bias.contiguous(), requires_grad=False
        )  # kernels read it through its pointer
    return linear
