"""The experts of a decoder layer as linears, although transformers stacks their weights to [E, rows, columns].

transformers' classes of experts follow one interface (`transformers.integrations.moe.use_experts_implementation`): they
hold gate and up in `gate_up_proj` [E, 2 I, H] and down in `down_proj` [E, H, I], and say how these are laid out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from bwla_converter.source.observe.names import StoredNames
from bwla_kernels.format.experts import EXPERT_LEAVES, experts_module
from torch import Tensor, nn

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""Names of the parameters of transformers' experts."""

LEAVES = EXPERT_LEAVES[0]
"""Names of an expert's linears where the files hold stacked tensors: those that vLLM looks for by default."""

_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    nn.functional.silu,
    nn.functional.gelu,
    lambda x: nn.functional.gelu(x, approximate="tanh"),
)
"""What `bwla_kernels.experts.ACTIVATIONS` names."""


@dataclass(frozen=True)
class Experts:
    """The experts of a decoder layer, all of the same sizes.

    Attributes:
        path: path of transformers' module in the decoder layer.
        stem: what the stored names of all experts' linears begin with, inside the decoder layer.
        leaves: names of gate, up and down, in the stored names and in `hf.expert_linears`.
        count: E, the number of experts.
        hidden: H, the width of their input and output.
        inner: I, the rows of a gate.
        stacked: stored names of the stacked tensors of gate and up and of down, inside the decoder layer; empty where
            each expert's are stored on their own.
        transposed: whether published files hold these as [E, columns, rows].
    """

    path: str
    stem: str
    leaves: tuple[str, str, str]
    count: int
    hidden: int
    inner: int
    stacked: tuple[str, ...] = ()
    transposed: bool = False

    @cached_property
    def gate_up(self) -> tuple[str, ...]:
        """Stored names of gate and up of all experts, inside the decoder layer."""
        return tuple(f"{self.stem}.{e}.{leaf}" for e in range(self.count) for leaf in self.leaves[:2])

    @cached_property
    def down(self) -> tuple[str, ...]:
        """Stored names of down of all experts, inside the decoder layer."""
        return tuple(f"{self.stem}.{e}.{self.leaves[2]}" for e in range(self.count))

    def divisions(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield each stacked tensor with the names of the linears that it holds; nothing where none are stacked."""
        if self.stacked:
            yield from zip(self.stacked, (self.gate_up, self.down), strict=True)

    def module_path(self, name: str) -> str:
        """Return the path in the decoder layer, see `hf.expert_linears`, of the linear stored as `name`."""
        return f"{self.path}{name.removeprefix(self.stem)}"

    def stored_name(self, path: str) -> str:
        """Return the stored name of the linear at `path` in the decoder layer: the inverse of `module_path`."""
        return f"{self.stem}{path.removeprefix(self.path)}"

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return rows and columns of the linear `name`."""
        is_down = name.rpartition(".")[2] == self.leaves[2]
        return (self.hidden, self.inner) if is_down else (self.inner, self.hidden)

    def split(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of single experts, as views, of those stacked tensors that are given.

        Args:
            prefix: what the full names begin with, such as `model.layers.3.`.
            tensors: tensors by their full names.
        """
        weights: dict[str, Tensor] = {}
        for stacked, names in self.divisions():
            if f"{prefix}{stacked}" in tensors:
                tensor = tensors[f"{prefix}{stacked}"]
                rows, columns = self.shape_of(names[0])
                # Files may hold them either way (Qwen3-VL); as transformers does, the shapes decide.
                if tensor.shape[1:] != (rows * len(names) // self.count, columns):
                    tensor = tensor.mT
                parts = tensor.reshape(len(names), rows, columns)
                weights.update(
                    {f"{prefix}{name}.weight": part for name, part in zip(names, parts, strict=True)}
                )
        return weights

    def stack(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `tensors` with stacked tensors in the place of the weights of single experts.

        Args:
            prefix: what the full names begin with.
            tensors: tensors by their full names, those of all experts among them.
        """
        joined = dict(tensors)
        for stacked, names in self.divisions():
            if f"{prefix}{names[0]}.weight" in joined:
                parts = torch.stack([joined.pop(f"{prefix}{name}.weight") for name in names])
                tensor = parts.reshape(self.count, -1, parts.shape[-1])
                joined[f"{prefix}{stacked}"] = tensor.mT.contiguous() if self.transposed else tensor
        return joined


def experts_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of the experts of a decoder layer that follow transformers' interface."""
    return {path: module for path, module in block.named_modules() if path and is_experts(module)}


def is_experts(module: nn.Module) -> bool:
    """Return whether a module follows transformers' interface of experts."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, DOWN)


def unsupported(module: nn.Module) -> str | None:
    """Return why transformers' experts `module` stay in 16 bits; None if they can be quantized."""
    if not getattr(module, "has_gate", False) or not hasattr(module, GATE_UP):
        return "experts without a gate have no kernel"
    if getattr(module, "has_bias", False):
        return "experts with biases have no kernel"
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return "experts stored transposed or interleaved have no kernel"
    own_gate = getattr(type(module), "_apply_gate", None)
    if getattr(own_gate, "__module__", "") != "transformers.integrations.moe":
        return "experts with a gating function of their own have no kernel"
    probe = torch.linspace(-4, 4, 33, device="cpu")
    activation = getattr(module, "act_fn", None)
    if activation is None or not any(torch.equal(activation(probe), known(probe)) for known in _ACTIVATIONS):
        return "experts with this activation have no kernel"
    return None


def find_experts(
    module: nn.Module,
    path: str,
    prefix: str,
    stored_prefix: str,
    names: StoredNames,
    parameters: Mapping[str, Sequence[str]],
) -> Experts | None:
    """Return how the experts `module` are stored; None where the rules of transformers do not tell.

    Args:
        module: transformers' experts.
        path: its path in the decoder layer.
        prefix: path of the decoder layer in transformers' model, with the dot at its end.
        stored_prefix: the same of its stored name.
        names: how the model's tensors are stored.
        parameters: parameter -> stored tensors.
    """
    count, rows, hidden = getattr(module, GATE_UP).shape
    found = [parameters.get(f"{prefix}{path}.{key}", ()) for key in (GATE_UP, DOWN)]
    if not all(name.startswith(stored_prefix) for stored in found for name in stored):
        return None
    if all(len(stored) == 1 for stored in found):
        stacked = tuple(stored[0].removeprefix(stored_prefix) for stored in found)
        transposed = _is_transposed(found[0][0], names, (count, hidden, rows))
        return Experts(path, path, LEAVES, count, hidden, rows // 2, stacked, transposed)
    gate_up, down = (_leaves(stored, names) for stored in found)
    stems = {stem for stem, _ in (*gate_up, *down)}
    complete = len(found[0]) == 2 * count and len(found[1]) == count
    if len(gate_up) != 2 or len(down) != 1 or len(stems) != 1 or not complete:
        return None
    leaves = (gate_up[0][1], gate_up[1][1], down[0][1])
    return Experts(path, stems.pop().removeprefix(stored_prefix), leaves, count, hidden, rows // 2)


def _is_transposed(name: str, names: StoredNames, shape: tuple[int, ...]) -> bool:
    """Return whether transformers transposes the stored tensor `name` if it has this shape."""
    if names.parameter(name)[1] is None:
        return False
    [parameter] = names.convert({name: torch.empty(shape, device="meta")}).values()
    return tuple(parameter.shape) != shape


def _leaves(stored: Sequence[str], names: StoredNames) -> list[tuple[str, str]]:
    """Return stem and name of each of an expert's linears among `stored`, in the order in which they are stacked."""
    order: dict[tuple[str, str], int] = {}
    for name in stored:
        linear = name.removesuffix(".weight")
        stem = experts_module(linear)
        if stem is None or linear == name:
            return []
        key = (stem, linear.rpartition(".")[2])
        if key not in order:
            order[key] = names.position(name)
    return sorted(order, key=lambda key: order[key])
