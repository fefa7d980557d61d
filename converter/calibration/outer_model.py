"""Run what is outside a model's decoder layers by the model's own forward, so that the layers can run one at a time.

The class that config.json names is built without weights. Its forward runs with every decoder layer replaced by a stub
that notes the layer's arguments and passes its input on. What is before the layers gives the hidden states before
layer 0, the rotary embeddings and the attention masks; what is after them turns hidden states into logits. Each module
outside the layers gets its weights when it first runs, so that those that text does not reach stay without.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from bwla_converter.hf.calls import Call, Conventions, as_returned, head_logits
from bwla_converter.hf.whole_model import (
    base_of,
    bases_of,
    build_without_weights,
    choose_attention,
    compute_buffers,
)
from bwla_converter.source.model import Source
from bwla_converter.source.observe.decoder import language_model_of, output_embeddings
from bwla_kernels.errors import SourceError
from torch import Tensor, nn
from transformers import AutoConfig

PROBE = ((0, 1, 2), (3, 4, 5))
"""Token ids of the run that finds out how the model calls its decoder layers: two samples of three tokens."""

MAX_SHAPES = 4
"""Shapes of token ids whose arguments are kept."""

MAX_TUPLE = 4
"""Longest tuple that a decoder layer is expected to return."""

ReadTensor = Callable[[str], Tensor]
"""Reads a tensor outside the decoder layers by its stored name."""


class OuterModel:
    """A model whose decoder layers have no weights.

    Args:
        source: the model's folder and structure.
        device: device of the weights and activations.
        dtype: their dtype.
        read: reads the tensors outside the decoder layers.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype, read: ReadTensor) -> None:
        self.source, self.device, self.dtype, self._read = source, device, dtype, read
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        self.model = build_without_weights(source.structure.architecture, config)
        self._language_model = language_model_of(self.model)
        self.attention = choose_attention(self.model, device)
        self.blocks_name = source.structure.layer_path(0).rpartition(".")[0]
        self.blocks = list(self.model.get_submodule(self.blocks_name).children())
        if len(self.blocks) != source.num_layers:
            raise SourceError(
                f"{source.folder}: expected a list of {source.num_layers} decoder layers in "
                f"{type(self.model).__name__}, found none: please report this model"
            )
        compute_buffers(self.model, device)
        self.model.requires_grad_(False).eval()
        self._tables: dict[str, Tensor] = {}
        self._table_names: list[str] = []
        self._skipped: frozenset[str] = frozenset()
        self._loaded: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._stand_ins: set[int] = set()
        self._calls: dict[torch.Size, list[Call]] = {}
        self._known: Conventions | None = None
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(f"{self.blocks_name}."):
                self._load_when_run(name, module)
        self._tell_device()

    @property
    def conventions(self) -> Conventions:
        """How the model calls its decoder layers; found at the first use."""
        if self._known is None:
            self._known = self._probe()
            self.release()
        return self._known

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        weight = self._head().weight
        assert isinstance(weight, Tensor)
        return len(weight)

    def block(self, index: int) -> nn.Module:
        """Return a new decoder layer `index`, with its parameters on the meta device."""
        block: nn.Module = copy.deepcopy(self.blocks[index])
        return block

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states before layer 0 for token ids [S, T]: [S, ..., hidden], samples first."""
        [call] = self._capture(ids, 0, self.conventions.tuple_length)
        return call.hidden.movedim(self.conventions.sample_axis, 0)

    @torch.no_grad()
    def arguments(self, index: int, ids: Tensor) -> Call:
        """Return the arguments of decoder layer `index` for token ids [S, T]; its hidden states are without meaning."""
        known = self.conventions
        if known.by_tokens:
            return self._capture(ids, index, known.tuple_length)[index]
        if ids.shape not in self._calls:
            while len(self._calls) >= MAX_SHAPES:
                del self._calls[next(iter(self._calls))]
            # Not those of relative positions (MPNet), which the arguments are made of.
            with self._without_tables(self.source.structure.module_path(self.source.structure.embedding)):
                calls = self._capture(ids, len(self.blocks) - 1, known.tuple_length)
            self._calls[ids.shape] = [replace(call, hidden=torch.empty(0)) for call in calls]
        return self._calls[ids.shape][index]

    def normed(self, hidden: Tensor) -> Tensor:
        """Return what the head reads [S, T, K] for the hidden states after the last layer [S, ..., hidden]."""
        known, last = self.conventions, self.blocks[-1]
        states = hidden.movedim(0, known.sample_axis)
        ids = torch.zeros(len(hidden), hidden.shape[-2], dtype=torch.long, device=self.device)

        def pass_on(block: nn.Module, call: Call) -> Any:
            return as_returned(states if block is last else call.hidden, known.tuple_length)

        with self._without_tables(*self._table_names), self._stubs(pass_on):
            normed: Tensor = self._base(ids).last_hidden_state
        return normed

    def logits(self, rows: Tensor) -> Tensor:
        """Return the logits [M, V] for what the head reads [M, K], in float32."""
        return head_logits(self.model, self.conventions.outputs, rows)

    def norm_inputs(self, hidden: Tensor) -> Tensor | None:
        """Return what the final norm reads [S, T, K]; None unless its output alone is what the head reads.

        Args:
            hidden: hidden states after the last layer [S, ..., hidden].
        """
        _ = self.conventions  # found by running the model, which the hook below must not see
        norm = self.final_norm()
        if norm is None:
            return None
        seen: list[tuple[Tensor, Tensor]] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((inputs[0], output))

        handle = norm.register_forward_hook(note)
        try:
            normed = self.normed(hidden)
        finally:
            handle.remove()
        alone = len(seen) == 1 and _same_values(seen[0][1], normed)
        return seen[0][0] if alone else None

    def final_norm(self) -> nn.Module | None:
        """Return the final norm with its weights; None where there is no norm with a weight vector."""
        structure = self.source.structure
        path = structure.module_path(structure.final_norm)
        if not structure.final_norm:
            return None
        norm: nn.Module = self.model.get_submodule(path)
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1:
            return None
        self._load(path, norm)
        return norm

    def release(self) -> None:
        """Release the weights outside the decoder layers; they are read again where they are needed again."""
        for module, key, empty in self._loaded:
            setattr(module, key, empty)
        self._loaded.clear()
        self._tables.clear()

    def _head(self) -> nn.Module:
        head: nn.Module | None = output_embeddings(self.model)
        if head is None:
            raise SourceError(
                f"{self.source.folder}: expected a model with a language-model head, found "
                f"{self.source.structure.architecture}, which has none: use recipe fast"
            )
        return head

    def _base(self, ids: Tensor) -> Any:
        return base_of(self.model)(input_ids=ids.to(self.device), use_cache=False)

    def _load_when_run(self, name: str, module: nn.Module) -> None:
        """Have a module read its own parameters just before it runs, and an embedding only the rows it looks up."""
        # Some embeddings of positions have arguments of their own.
        if isinstance(module, nn.Embedding) and len(inspect.signature(module.forward).parameters) == 1:
            module.padding_idx = None  # which matters for gradients only
            # No memory, but on the right device: some models ask the weight for its device or its padding row.
            row = torch.zeros(1, module.embedding_dim, dtype=self.dtype, device=self.device)
            module.weight = nn.Parameter(row.expand(module.num_embeddings, -1), requires_grad=False)
            self._table_names.append(name)
            module.__dict__["forward"] = self._lookup(name, module, module.forward)
        elif any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_: self._load(name, module))

    def _tell_device(self) -> None:
        """Put a zero on the device in place of each base model's first parameter, which it takes its own device from.

        Idefics 3 moves what its decoder layers read to the device of its vision tower.
        """
        for base in bases_of(self.model):
            name, parameter = next(base.named_parameters())
            if parameter.is_meta:
                zero = torch.zeros((), dtype=self.dtype, device=self.device).expand(parameter.shape)
                stand_in = nn.Parameter(zero, requires_grad=False)
                path, _, key = name.rpartition(".")
                setattr(base.get_submodule(path), key, stand_in)
                self._stand_ins.add(id(stand_in))

    def _load(self, name: str, module: nn.Module) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta or id(parameter) in self._stand_ins:
                tensor = self._read(self.source.stored_name(f"{name}.{key}" if name else key))
                value = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
                setattr(module, key, value)
                self._loaded.append((module, key, parameter))

    def _lookup(
        self, name: str, module: nn.Embedding, forward: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor], Tensor]:
        def look_up(ids: Tensor) -> Tensor:
            if name in self._skipped:
                rows = torch.zeros(1, module.embedding_dim, dtype=self.dtype, device=self.device)
                numbers = torch.zeros_like(ids)
            else:
                if name not in self._tables:
                    self._tables[name] = self._read(self.source.stored_name(f"{name}.weight"))
                table = self._tables[name]
                found, numbers = ids.unique(return_inverse=True)
                rows = table[found.to(table.device)].to(self.device, self.dtype)
            empty = module.weight
            module.weight = nn.Parameter(rows, requires_grad=False)
            try:
                return forward(numbers)
            finally:
                module.weight = empty

        return look_up

    @contextmanager
    def _without_tables(self, *names: str) -> Iterator[None]:
        """Look up zeros in the embeddings of these names, where only the shapes matter."""
        before, self._skipped = self._skipped, frozenset(names)
        try:
            yield
        finally:
            self._skipped = before

    @contextmanager
    def _stubs(self, forward: Callable[[nn.Module, Call], Any]) -> Iterator[None]:
        """Replace the forward of every decoder layer."""

        def stub_of(block: nn.Module) -> Callable[..., Any]:
            return lambda *args, **kwargs: forward(block, Call.of(block, args, kwargs))

        for block in self.blocks:
            block.forward = stub_of(block)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward  # the class's own method again

    def _capture(self, ids: Tensor, last: int, tuple_length: int) -> list[Call]:
        """Return the arguments of decoder layers 0 to `last`; what follows that one is not computed."""
        calls: list[Call] = []

        def note(_: nn.Module, call: Call) -> Any:
            calls.append(call)
            if len(calls) > last:
                raise _ReachedError
            return as_returned(call.hidden, tuple_length)

        with self._stubs(note):
            try:  # not the base model alone: BLIP's decoder tells it that it is a decoder
                self._language_model(input_ids=ids.to(self.device), use_cache=False)
            except _ReachedError:
                return calls
        raise SourceError(
            f"{self.source.folder}: expected {type(self.model).__name__} to run its {len(self.blocks)} decoder layers "
            f"one after another, found that it runs {len(calls)}: this model is not supported"
        )

    @torch.no_grad()
    def _probe(self) -> Conventions:
        ids = torch.tensor(PROBE)
        tuple_length, outputs = self._find_tuple_length(ids)
        calls, others = (
            self._capture(tokens, len(self.blocks) - 1, tuple_length) for tokens in (ids, ids.flip(1))
        )
        [alone] = self._capture(ids[:1], 0, tuple_length)
        sizes = zip(calls[0].hidden.shape, alone.hidden.shape, strict=True)
        axis = next(axis for axis, (both, one) in enumerate(sizes) if both != one)
        by_tokens = any(
            not torch.equal(first, second)
            for call, other in zip(calls, others, strict=True)
            for first, second in zip(call.tensors(), other.tensors(), strict=True)
        )
        shares = any(call.shared_key is not None for call in calls)
        return Conventions(tuple_length, axis, by_tokens, shares, outputs)

    def _find_tuple_length(self, ids: Tensor) -> tuple[int, Any]:
        """Return what the stubs must return for the hidden states to arrive unchanged, and the base model's outputs."""
        problem: Exception | None = None
        for length in range(MAX_TUPLE + 1):
            shapes: list[torch.Size] = []

            def pass_on(_: nn.Module, call: Call, length: int = length, shapes: list[Any] = shapes) -> Any:
                shapes.append(call.hidden.shape)
                return as_returned(call.hidden, length)

            try:
                with self._stubs(pass_on):
                    outputs = self._base(ids)
            except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
                problem = problem or error
                continue
            if outputs.last_hidden_state.shape[:-1] == ids.shape and len(set(shapes)) == 1:
                return length, outputs
        raise SourceError(
            f"{self.source.folder}: expected {type(self.model).__name__} to run on token ids alone, with decoder "
            f"layers that return their hidden states, found another ({problem}): this model is not supported"
        )


def _same_values(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same or views of each other with all its values."""
    return tensor.data_ptr() == other.data_ptr() and tensor.numel() == other.numel()


class _ReachedError(Exception):
    """Stops a model at the last decoder layer whose arguments are wanted."""
