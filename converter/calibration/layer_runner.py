"""Run a single decoder layer by the model's own code: a transformers model with one layer."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bwla_converter.hf.attention import attention_implementation
from bwla_converter.source.model import Source
from bwla_kernels.errors import SourceError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModel


class LayerRunner:
    """Build decoder layers of a model one at a time, with the model's own rotary embedding and attention mask.

    Args:
        source: the model.
        device: device of the layers.
        dtype: dtype of their weights and activations.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        self.types = getattr(self.config, "layer_types", None)
        # transformers' other attention implementations ignore the soft cap (Gemma 2).
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        self.attention = "eager" if capped else attention_implementation(device)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states before layer 0 for token ids [S, T]: [S, T, hidden]."""
        table = self.source.read([self.source.embedding_weight])[self.source.embedding_weight]
        hidden: Tensor = nn.functional.embedding(ids, table).to(self.dtype)
        return hidden * self.embedding_scale

    @property
    def embedding_scale(self) -> float:
        """The factor by which the model multiplies its embeddings."""
        return float(self.config.hidden_size**0.5) if self.source.structure.scaled_embedding else 1.0

    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> "DecoderLayer":
        """Build decoder layer `index` from its stored tensors, given by their full names."""
        config = self._one_layer_config(index)
        with torch.device("meta"):
            model = AutoModel.from_config(config, attn_implementation=self.attention)
        prefix = self.source.structure.layer_name(index) + "."
        state = {
            f"layers.0.{name.removeprefix(prefix)}": tensor.to(self.device, self.dtype)
            for name, tensor in tensors.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        model.load_state_dict(state, strict=False, assign=True)
        # The rotary embedding's buffers are computed instead of stored; the final norm is not part of a layer.
        model.rotary_emb = type(model.rotary_emb)(config).to(self.device)
        model.norm = nn.Identity()
        model.requires_grad_(False)
        return DecoderLayer(model.eval(), prefix)

    def final_norm(self) -> nn.Module:
        """Build the original model's final norm."""
        with torch.device("meta"):
            norm: nn.Module = AutoModel.from_config(self._one_layer_config(0)).norm
        names = {key: f"{self.source.structure.final_norm}.{key}" for key in norm.state_dict()}
        tensors = self.source.read(list(names.values()))
        state = {key: tensors[name].to(self.device, self.dtype) for key, name in names.items()}
        norm.load_state_dict(state, assign=True)
        return norm.requires_grad_(False).eval()

    def _one_layer_config(self, index: int) -> Any:
        """Return the config of a model whose only layer is layer `index`."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = 1
        if self.types is not None:
            config.layer_types = [self.types[index]]
        return config


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
        model: the model of one layer.
        prefix: prefix of the layer's names in the checkpoint, such as `model.layers.3.`.
    """

    def __init__(self, model: nn.Module, prefix: str) -> None:
        self.model, self.prefix = model, prefix

    @property
    def layer(self) -> nn.Module:
        """The decoder layer's module."""
        layer: nn.Module = self.model.get_submodule("layers.0")
        return layer

    def run(self, hidden: Tensor) -> Tensor:
        """Return the layer's outputs [S, T, hidden] for its inputs [S, T, hidden]."""
        outputs: Tensor = self.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return outputs

    def linear(self, name: str) -> nn.Module:
        """Return the linear with the given full name."""
        return self.layer.get_submodule(name.removeprefix(self.prefix))

    def replace(self, name: str, module: nn.Module) -> None:
        """Replace the linear with the given full name by another module."""
        parent, _, child = name.removeprefix(self.prefix).rpartition(".")
        setattr(self.layer.get_submodule(parent), child, module)

    def output_projections(self, names: Iterable[str], hidden: Tensor) -> dict[str, OutputProjection]:
        """Run the layer on `hidden` [S, T, hidden] and return the output projections among the linears `names`."""
        projections: dict[str, OutputProjection] = {}
        outputs: dict[str, Tensor] = {}

        def watch(name: str, path: str) -> Iterator[RemovableHandle]:
            def linear_done(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
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
            path = name.removeprefix(self.prefix).rpartition(".")[0]
            if path:
                handles += watch(name, path)
        try:
            self.run(hidden)
        finally:
            for handle in handles:
                handle.remove()
        return projections

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

    def inputs_of(self, name: str, hidden: Tensor) -> Tensor:
        """Return the inputs of a linear when the layer runs on `hidden`; what follows it is not computed.

        Args:
            name: full name of the linear.
            hidden: inputs of the layer [S, T, hidden].

        Raises:
            SourceError: the layer does not use the linear.
        """
        return self.inputs_and_stream(name, None, hidden)[0]

    def inputs_and_stream(
        self, name: str, stream: str | None, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the inputs of a linear, and of the module at path `stream` in the layer, which runs before it."""
        streams: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs[0])

        handles = [self.linear(name).register_forward_pre_hook(stop)]
        if stream is not None:
            watched = self.layer.get_submodule(stream)
            handles.append(watched.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0])))
        try:
            self.run(hidden)
        except _ReachedError as reached:
            return reached.inputs, streams[-1] if streams else None
        finally:
            for handle in handles:
                handle.remove()
        raise SourceError(
            f"{name}: expected the model to use this linear, found that it does not: please report this model"
        )


class _ReachedError(Exception):
    """Stops a layer at the linear whose inputs were requested."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs
