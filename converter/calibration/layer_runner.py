"""Run a single decoder layer by the model's own code, with the arguments that the model's own forward gives it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from bwla_converter.calibration.outer_model import OuterModel, ReadTensor
from bwla_converter.hf.calls import Call
from bwla_converter.hf.expert_linears import ExpertLinears, divide_experts, experts_around
from bwla_converter.source.model import Source
from bwla_kernels.errors import SourceError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Shared = dict[Any, tuple[Tensor, ...]]
"""States that decoder layers leave for later ones, such as the keys and values that Gemma 3n's last layers share."""


@dataclass(frozen=True)
class Batch:
    """Samples before a decoder layer.

    Attributes:
        hidden: hidden states [S, T, hidden]; those of Gemma 3n are [S, streams, T, hidden].
        ids: token ids [S, T].
        shared: what earlier layers left; each tensor has the samples first.
    """

    hidden: Tensor
    ids: Tensor
    shared: Shared = field(default_factory=dict)


class LayerRunner:
    """Build decoder layers of a model one at a time, and run what is outside them.

    Args:
        source: the model.
        device: device of the layers.
        dtype: dtype of their weights and activations.
        read: reads the tensors outside the decoder layers by their names in the model; None for the source's.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        read: ReadTensor | None = None,
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype

        def read_original(name: str) -> Tensor:
            stored = source.tied.get(name, name)
            return source.read([stored])[stored]

        self.outer = OuterModel(source, device, dtype, read or read_original)

    @property
    def attention(self) -> str:
        """Name of the attention implementation."""
        return self.outer.attention

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states before layer 0 for token ids [S, T]: [S, T, hidden], see `Batch`."""
        return self.outer.embed(ids)

    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> "DecoderLayer":
        """Build decoder layer `index` from its stored tensors, given by their full names."""
        state = {
            key: tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
            for key, tensor in self.source.block_state(index, tensors).items()
        }
        block = self.outer.block(index)
        block.load_state_dict(state, strict=False, assign=True)
        block.requires_grad_(False)
        divide_experts(block, self.source.experts_of_layer(index))
        structure, axis = self.source.structure, self.outer.conventions.sample_axis
        return DecoderLayer(
            block.eval(),
            f"{structure.layer_name(index)}.",
            structure.member_path,
            lambda ids: self.outer.arguments(index, ids),
            axis,
        )


@dataclass(frozen=True)
class OutputProjection:
    """A linear whose output is the output of its submodule, such as `o_proj` of the attention.

    Attributes:
        submodule: path of the submodule in the decoder layer.
        num_outputs: length of the tuple that the submodule returns, the linear's output first; None if it returns that
            output alone.
    """

    submodule: str
    num_outputs: int | None


class DecoderLayer:
    """A decoder layer that can be run, inspected and modified.

    Args:
        layer: the decoder layer's module.
        prefix: prefix of the layer's names in the checkpoint, such as `model.layers.3.`.
        path_of: full name of a linear in the checkpoint -> its path in the module.
        arguments: token ids [S, T] -> the arguments with which the model calls the layer.
        sample_axis: axis of the samples in the hidden states that the layer takes.
    """

    def __init__(
        self,
        layer: nn.Module,
        prefix: str,
        path_of: Callable[[str], str],
        arguments: Callable[[Tensor], Call],
        sample_axis: int = 0,
    ) -> None:
        self.layer, self.prefix, self._path_of = layer, prefix, path_of
        self._arguments, self._sample_axis = arguments, sample_axis

    def run(self, batch: Batch) -> Tensor:
        """Return the layer's outputs, of the shape of its inputs `batch.hidden`."""
        return self.run_sharing(batch)[0]

    def run_sharing(self, batch: Batch) -> tuple[Tensor, Shared]:
        """Return the layer's outputs, and the states that it leaves for later layers."""
        call = self._arguments(batch.ids)
        shared = dict(batch.shared)
        outputs = call.run(self.layer, batch.hidden.movedim(0, self._sample_axis), shared)
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        left = {key: states for key, states in shared.items() if states is not batch.shared.get(key)}
        return hidden.movedim(self._sample_axis, 0), left

    def linear(self, name: str) -> nn.Module:
        """Return the linear with the given full name."""
        return self.layer.get_submodule(self._path_of(name))

    def experts_of(self, name: str) -> ExpertLinears | None:
        """Return the experts that the linear with the given full name belongs to; None for any other linear."""
        return experts_around(self.layer, self._path_of(name))

    def routing(self, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the experts that hold the linear `name` read [M, H], and their numbers for each token [M, top-k].

        Args:
            name: full name of a linear of the experts.
            batch: inputs of the layer.
        """
        experts = self.experts_of(name)
        assert experts is not None
        hidden, chosen, *_ = self._inputs_until(experts, name, batch)
        return hidden, chosen

    def replace(self, name: str, module: nn.Module) -> None:
        """Replace the linear with the given full name by another module."""
        parent, _, child = self._path_of(name).rpartition(".")
        setattr(self.layer.get_submodule(parent), child, module)

    def output_projections(self, names: Iterable[str], batch: Batch) -> dict[str, OutputProjection]:
        """Run the layer and return the output projections among the linears `names`.

        A layer that leaves states for later ones has none: what computes these states must not be skipped.
        """
        projections: dict[str, OutputProjection] = {}
        outputs: dict[str, Tensor] = {}

        def watch(name: str, path: str) -> Iterator[RemovableHandle]:
            def linear_done(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                if len(inputs[0]) == len(batch.hidden):  # not all tokens in one row, as in experts
                    outputs[name] = output

            def submodule_done(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if first is outputs.get(name):
                    num_outputs = len(output) if isinstance(output, tuple) else None
                    projections[name] = OutputProjection(path, num_outputs)

            yield self.linear(name).register_forward_hook(linear_done)
            yield self.layer.get_submodule(path).register_forward_hook(submodule_done)

        handles: list[RemovableHandle] = []
        for name in names:
            path = self._path_of(name).rpartition(".")[0]
            if path:
                handles += watch(name, path)
        try:
            left = self.run_sharing(batch)[1]
        finally:
            for handle in handles:
                handle.remove()
        return {} if left else projections

    @contextmanager
    def resumed(
        self, inputs: Mapping[str, Tensor], projections: Mapping[str, OutputProjection]
    ) -> Iterator[None]:
        """Skip everything before some output projections, whose inputs are known already.

        Args:
            inputs: full name of an output projection -> its inputs [S, T, K].
            projections: what `output_projections` returned.
        """

        def forward_of(linear: nn.Module, known: Tensor, num_outputs: int | None) -> Callable[..., Any]:
            def forward(*_: object, **__: object) -> Any:
                output = linear(known)
                return output if num_outputs is None else (output, *[None] * (num_outputs - 1))

            return forward

        modules = []
        for name, known in inputs.items():
            module = self.layer.get_submodule(projections[name].submodule)
            module.forward = forward_of(self.linear(name), known, projections[name].num_outputs)
            modules.append(module)
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class's own method again

    def inputs_of(self, name: str, batch: Batch) -> Tensor:
        """Return the inputs of a linear when the layer runs; what follows it is not computed.

        Args:
            name: full name of the linear.
            batch: inputs of the layer.

        Raises:
            SourceError: the layer does not use the linear.
        """
        return self.inputs_and_stream(name, None, batch)[0]

    def inputs_and_stream(self, name: str, stream: str | None, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the inputs of a linear, and of the module at path `stream` in the layer, which runs before it."""
        streams: list[Tensor] = []
        handles = []
        if stream is not None:
            watched = self.layer.get_submodule(stream)
            handles.append(watched.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])))
        # Gate and up of all experts read what the experts as a whole read, and few tokens reach a single one.
        reader = self.experts_of(name) or self.linear(name)
        try:
            return self._inputs_until(reader, name, batch)[0], streams[-1] if streams else None
        finally:
            for handle in handles:
                handle.remove()

    def _inputs_until(self, module: nn.Module, name: str, batch: Batch) -> tuple[Tensor, ...]:
        """Return the inputs of a module when the layer runs; what follows it is not computed.

        Args:
            module: the module.
            name: full name of the linear that is asked about, for the message.
            batch: inputs of the layer.

        Raises:
            SourceError: the layer does not use the module.
        """

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs)

        handle = module.register_forward_pre_hook(stop)
        try:
            self.run(batch)
        except _ReachedError as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise SourceError(
            f"{name}: expected the model to use this linear, found that it does not: please report this model"
        )


class _ReachedError(Exception):
    """Stops a layer at the module whose inputs were requested."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.inputs = inputs
