"""The experts of a decoder layer as linears, although transformers stacks their weights to [E, rows, columns].

transformers' classes of experts follow one interface (`transformers.integrations.moe.use_experts_implementation`): they
hold gate and up in `gate_up_proj` [E, 2 I, H] and down in `down_proj` [E, H, I], and say how these are laid out.
gpt-oss transposes both, alternates between rows of the gate and of up, and has biases `gate_up_proj_bias` [E, 2 I] and
`down_proj_bias` [E, H].
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from bwla_converter.source.observe.names import StoredNames
from bwla_kernels.experts.reference import swiglu_oai
from bwla_kernels.format.experts import BIAS_DTYPE, EXPERT_LEAVES, experts_module
from bwla_kernels.format.files import Entry
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
"""What `bwla_kernels.experts.ACTIVATIONS` names, but for that of gpt-oss, which is a function of gate and up."""


@dataclass(frozen=True)
class Layout:
    """How transformers' experts hold their weights.

    Attributes:
        transposed: [E, columns, rows] instead of [E, rows, columns].
        interleaved: rows of the gate and of up alternate, instead of all rows of the gate first.
        bias: whether both projections have biases.
    """

    transposed: bool = False
    interleaved: bool = False
    bias: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        """Return the layout of transformers' experts `module`."""
        return cls(
            bool(getattr(module, "is_transposed", False)),
            not getattr(module, "is_concatenated", True),
            bool(getattr(module, "has_bias", False)),
        )

    def sizes(self, gate_up: Tensor) -> tuple[int, int, int]:
        """Return E, H and I of the parameter of gate and up."""
        count, rows, columns = gate_up.shape
        return (count, rows, columns // 2) if self.transposed else (count, columns, rows // 2)

    def halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Divide the rows [2 I, ...] of gate and up of one expert, as views."""
        gate, up = (rows[::2], rows[1::2]) if self.interleaved else rows.chunk(2)
        return gate, up


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
        layout: how transformers' module holds its weights; stacked tensors are stored in its order of rows.
        biases: stored names of the stacked biases of gate and up and of down; empty where there are none.
    """

    path: str
    stem: str
    leaves: tuple[str, str, str]
    count: int
    hidden: int
    inner: int
    stacked: tuple[str, ...] = ()
    transposed: bool = False
    layout: Layout = Layout()
    biases: tuple[str, ...] = ()

    @cached_property
    def gate_up(self) -> tuple[str, ...]:
        """Stored names of gate and up of all experts, inside the decoder layer."""
        return tuple(f"{self.stem}.{e}.{leaf}" for e in range(self.count) for leaf in self.leaves[:2])

    @cached_property
    def down(self) -> tuple[str, ...]:
        """Stored names of down of all experts, inside the decoder layer."""
        return tuple(f"{self.stem}.{e}.{self.leaves[2]}" for e in range(self.count))

    def divisions(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield each stacked tensor with the names of the tensors that it holds; nothing where none are stacked."""
        for key, stacked in (("weight", self.stacked), ("bias", self.biases)):
            if stacked:
                for name, linears in zip(stacked, (self.gate_up, self.down), strict=True):
                    yield name, tuple(f"{linear}.{key}" for linear in linears)

    def entry(self, name: str, stacked: Entry) -> Entry:
        """Return the entry of an expert's tensor, from that of the stacked tensor that holds it.

        Biases are read in the dtype in which they are stored in one-bit models.
        """
        linear, _, key = name.rpartition(".")
        rows, columns = self.shape_of(linear)
        if key == "bias":
            return replace(stacked, shape=(rows,), dtype=BIAS_DTYPE)
        return replace(stacked, shape=(rows, columns))

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
        """Return the tensors of single experts that the given stacked tensors hold: weights as views, biases as copies.

        Args:
            prefix: what the full names begin with, such as `model.layers.3.`.
            tensors: tensors by their full names.
        """
        found: dict[str, Tensor] = {}
        for stacked, names in self.divisions():
            if f"{prefix}{stacked}" in tensors:
                tensor = tensors[f"{prefix}{stacked}"]
                rows = tensor if stacked in self.biases else self._by_rows(tensor, names[0])
                parts: list[Tensor] = []
                for expert in rows:
                    parts += self.layout.halves(expert) if len(names) > self.count else (expert,)
                if stacked in self.biases:
                    parts = [part.to(BIAS_DTYPE, copy=True) for part in parts]
                found.update({f"{prefix}{name}": part for name, part in zip(names, parts, strict=True)})
        return found

    def _by_rows(self, tensor: Tensor, name: str) -> Tensor:
        """Return a stacked tensor as [E, rows, columns], a view; `name` is that of a weight in it."""
        if self.layout.transposed:
            return tensor.mT  # also where rows and columns are as many, as in gpt-oss 20B
        # Files may hold them either way (Qwen3-VL); as transformers does, the shapes decide.
        columns = self.shape_of(name.removesuffix(".weight"))[1]
        rows = tensor[0].numel() // columns
        return tensor if tensor.shape[1:] == (rows, columns) else tensor.mT

    def stack(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `tensors` with stacked tensors in the place of the weights and biases of single experts.

        Args:
            prefix: what the full names begin with.
            tensors: tensors by their full names, those of all experts among them.
        """
        joined = dict(tensors)
        for stacked, names in self.divisions():
            if f"{prefix}{names[0]}" in joined:
                parts = torch.stack([joined.pop(f"{prefix}{name}") for name in names])
                parts = parts.unflatten(0, (self.count, -1))
                tensor = (parts.transpose(1, 2) if self.layout.interleaved else parts).flatten(1, 2)
                flip = self.transposed and stacked not in self.biases
                joined[f"{prefix}{stacked}"] = tensor.mT.contiguous() if flip else tensor
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
    own_gate = getattr(type(module), "_apply_gate", None)
    if getattr(own_gate, "__module__", "") != "transformers.integrations.moe":
        return None if is_swiglu_oai(module) else "experts with a gating function of their own have no kernel"
    probe = torch.linspace(-4, 4, 33, device="cpu")
    activation = getattr(module, "act_fn", None)
    if activation is None or not any(torch.equal(activation(probe), known(probe)) for known in _ACTIVATIONS):
        return "experts with this activation have no kernel"
    return None


def is_swiglu_oai(module: nn.Module) -> bool:
    """Return whether the gating function of transformers' experts `module` is that of gpt-oss, with its constants."""
    apply = getattr(module, "_apply_gate", None)
    if apply is None or not (hasattr(module, "limit") and hasattr(module, "alpha")):
        return False
    gate, up = torch.linspace(-20, 20, 81, device="cpu"), torch.linspace(20, -15, 81, device="cpu")
    rows = torch.stack((gate, up), -1).flatten() if Layout.of(module).interleaved else torch.cat((gate, up))
    return torch.equal(apply(rows), swiglu_oai(gate, up))


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
    layout = Layout.of(module)
    parameter = getattr(module, GATE_UP)
    count, hidden, inner = layout.sizes(parameter)
    found = [parameters.get(f"{prefix}{path}.{key}", ()) for key in (GATE_UP, DOWN)]
    biases = [parameters.get(f"{prefix}{path}.{key}_bias", ()) for key in (GATE_UP, DOWN) if layout.bias]
    if not all(name.startswith(stored_prefix) for stored in (*found, *biases) for name in stored):
        return None
    if all(len(stored) == 1 for stored in (*found, *biases)):
        stacked, stacked_biases = (
            tuple(stored[0].removeprefix(stored_prefix) for stored in names_of)
            for names_of in (found, biases)
        )
        turned = _is_transposed(found[0][0], names, (count, *parameter.shape[:0:-1]))
        transposed = turned != layout.transposed
        return Experts(path, path, LEAVES, count, hidden, inner, stacked, transposed, layout, stacked_biases)
    if layout != Layout():
        return None
    gate_up, down = (_leaves(stored, names) for stored in found)
    stems = {stem for stem, _ in (*gate_up, *down)}
    complete = len(found[0]) == 2 * count and len(found[1]) == count
    if len(gate_up) != 2 or len(down) != 1 or len(stems) != 1 or not complete:
        return None
    leaves = (gate_up[0][1], gate_up[1][1], down[0][1])
    return Experts(path, stems.pop().removeprefix(stored_prefix), leaves, count, hidden, inner)


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
