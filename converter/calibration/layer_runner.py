"""One decoder block at a time, run by the model's own code: a transformers model whose only layer is swapped."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from bwla_converter.source.model import Source
from bwla_converter.source.names import FINAL_NORM
from bwla_kernels.errors import SourceError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel


class LayerRunner:
    """A model of one decoder block, with rotary embedding and attention mask as the model makes them.

    Args:
        source: the model.
        device: where blocks run.
        dtype: of weights and activations.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        self.types = getattr(self.config, "layer_types", None)
        # transformers' other implementations of attention leave the soft cap out (Gemma 2).
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        self.attention = "eager" if capped else None

    def embed(self, ids: Tensor) -> Tensor:
        """Inputs of block 0: token ids [S, T] -> [S, T, hidden]."""
        name = "model.embed_tokens.weight"
        table = self.source.read([name])[name]
        hidden: Tensor = nn.functional.embedding(ids, table).to(self.dtype)
        return hidden * self.config.hidden_size**0.5 if self.source.family.scaled_embedding else hidden

    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> "DecoderLayer":
        """Block `index` with its stored tensors, by their full names."""
        config = self._one_block(index)
        with torch.device("meta"):
            model = AutoModel.from_config(config, attn_implementation=self.attention)
        prefix = self.source.family.layer_name(index) + "."
        state = {
            f"layers.0.{name.removeprefix(prefix)}": tensor.to(self.device, self.dtype)
            for name, tensor in tensors.items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        model.load_state_dict(state, strict=False, assign=True)
        # Its buffers are computed, not stored, and the last norm belongs to the head.
        model.rotary_emb = type(model.rotary_emb)(config).to(self.device)
        model.norm = nn.Identity()
        model.requires_grad_(False)
        return DecoderLayer(model.eval(), prefix)

    def final_norm(self) -> nn.Module:
        """The norm before the head, as the original has it."""
        with torch.device("meta"):
            norm: nn.Module = AutoModel.from_config(self._one_block(0)).norm
        names = {key: f"{FINAL_NORM}.{key}" for key in norm.state_dict()}
        tensors = self.source.read(list(names.values()))
        state = {key: tensors[name].to(self.device, self.dtype) for key, name in names.items()}
        norm.load_state_dict(state, assign=True)
        return norm.requires_grad_(False).eval()

    def _one_block(self, index: int) -> Any:
        """The config of a model whose only block is number `index`."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = 1
        if self.types is not None:
            config.layer_types = [self.types[index]]
        return config


class DecoderLayer:
    """One decoder block that can be run, looked into and changed.

    Args:
        model: the one-layer model.
        prefix: what its linears' names start with in the checkpoint, `model.layers.3.`.
    """

    def __init__(self, model: nn.Module, prefix: str) -> None:
        self.model, self.prefix = model, prefix

    @property
    def layer(self) -> nn.Module:
        """The decoder layer itself."""
        layer: nn.Module = self.model.get_submodule("layers.0")
        return layer

    def run(self, hidden: Tensor) -> Tensor:
        """[S, T, hidden] -> [S, T, hidden]."""
        out: Tensor = self.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return out

    def linear(self, name: str) -> nn.Module:
        """The linear of that name in the checkpoint."""
        return self.layer.get_submodule(name.removeprefix(self.prefix))

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in a linear's place."""
        parent, _, child = name.removeprefix(self.prefix).rpartition(".")
        setattr(self.layer.get_submodule(parent), child, module)

    def inputs_of(self, name: str, hidden: Tensor) -> Tensor:
        """What the linear called `name` gets when the block runs on `hidden`; what comes after it is not computed.

        Raises:
            SourceError: the block ran without it.
        """
        return self.inputs_and_stream(name, None, hidden)[0]

    def inputs_and_stream(
        self, name: str, stream: str | None, hidden: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `inputs_of`, and what the module at path `stream` in the block got before."""
        seen: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs[0])

        handles = [self.linear(name).register_forward_pre_hook(stop)]
        if stream is not None:
            watched = self.layer.get_submodule(stream)
            handles.append(watched.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])))
        try:
            self.run(hidden)
        except _ReachedError as reached:
            return reached.inputs, seen[-1] if seen else None
        finally:
            for handle in handles:
                handle.remove()
        raise SourceError(
            f"{name}: expected the model to use this linear, found that it does not: report this"
        )


class _ReachedError(Exception):
    """Ends a block's run at the linear that was asked for."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs
