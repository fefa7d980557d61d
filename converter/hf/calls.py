"""How a model of transformers calls its decoder layers and its head."""

import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from bwla_converter.hf.whole_model import bases_of
from bwla_converter.source.observe.decoder import language_model_of
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Call:
    """The arguments of a decoder layer.

    Attributes:
        hidden: its hidden states.
        args: its positional arguments after the hidden states.
        kwargs: its keyword arguments, without the hidden states.
        key: keyword of the hidden states; None where they are the first positional argument.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key: str | None

    @classmethod
    def of(cls, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Call":
        """Return the call of `block` with the given arguments."""
        if args:
            return cls(args[0], args[1:], kwargs, None)
        key = next(name for name in inspect.signature(type(block).forward).parameters if name != "self")
        return cls(kwargs[key], (), {name: value for name, value in kwargs.items() if name != key}, key)

    @property
    def shared_key(self) -> str | None:
        """Keyword of the mapping, empty before layer 0, in which layers leave states for later ones; None for none."""
        return next((key for key, value in self.kwargs.items() if _is_shared(value)), None)

    def run(self, block: nn.Module, hidden: Tensor, shared: MutableMapping[Any, Any]) -> Any:
        """Call a decoder layer with other hidden states and with the states that earlier layers left."""
        kwargs = dict(self.kwargs)
        if self.shared_key is not None:
            kwargs[self.shared_key] = shared
        if self.key is None:
            return block(hidden, *self.args, **kwargs)
        return block(**{self.key: hidden}, **kwargs)

    def tensors(self) -> list[Tensor]:
        """Return all tensors among the arguments, without the hidden states."""
        return list(_tensors_in((self.args, self.kwargs)))


def _is_shared(value: Any) -> bool:
    return isinstance(value, MutableMapping) and not value


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors_in(part)


@dataclass(frozen=True)
class Conventions:
    """How a model calls its decoder layers.

    Attributes:
        tuple_length: length of the tuple that a decoder layer returns, its hidden states first; 0 for a tensor.
        sample_axis: axis of the samples in the hidden states.
        by_tokens: whether the arguments depend on the token ids, not only on their number.
        shares: whether layers leave states for later ones.
        outputs: outputs of the base model, for its type.
    """

    tuple_length: int
    sample_axis: int
    by_tokens: bool
    shares: bool
    outputs: Any


def head_logits(model: PreTrainedModel, outputs: Any, rows: Tensor) -> Tensor:
    """Run the part of a language model after its base model, by the model's own forward.

    Args:
        model: the language model.
        outputs: outputs of its base model, for their type.
        rows: hidden states of the base model [M, K].

    Returns: the logits [M, V] in float32.
    """
    bases = bases_of(model)
    for base in bases:  # the head may call any of them
        base.forward = lambda *_, **__: replace(outputs, last_hidden_state=rows.unsqueeze(1))
    try:
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        logits: Tensor = language_model_of(model)(input_ids=ids, use_cache=False).logits
    finally:
        for base in bases:
            del base.forward  # the class's own method again
    return logits.squeeze(1).float()


def as_returned(hidden: Tensor, tuple_length: int) -> Any:
    return (hidden, *[None] * (tuple_length - 1)) if tuple_length else hidden
