"""Run a model once without its weights, and note what each linear reads and what its output is added to.

torch's fake tensors have shapes and no values, so that a model of any size runs within seconds. Of decoder layers with
the same modules only the first runs; the others return what it returned.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from bwla_converter.source.observe.experts import is_experts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

NUM_TOKENS = 4

Key = tuple[int, int, int, int, int]
"""What identifies the values of a tensor: its storage and offset, its width and size, and how often it was changed."""


@dataclass
class BlockRecord:
    """What happened in a decoder layer.

    Attributes:
        inputs: path of each linear that ran, and of a layer's experts, in order of their first use -> what it read.
        streams: path of a linear whose output was added to another tensor as it is -> path of the norm that read that
            other tensor.
    """

    inputs: dict[str, Key] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What happened in a model.

    Attributes:
        blocks: of each decoder layer.
        final_norm: path, in the decoder, of the norm after the last layer whose output is the decoder's; None if none
            was found.
    """

    blocks: Sequence[BlockRecord]
    final_norm: str | None


def observe_run(decoder: PreTrainedModel, layers: nn.ModuleList) -> Record:
    """Run `decoder`, which is on the meta device, on a few token ids.

    Args:
        decoder: the model without its head.
        layers: its decoder layers.

    Raises:
        Exception: of any type, where the model's code needs values.
    """
    kinds = block_kinds(layers)
    try:
        return _run(decoder, layers, kinds)
    except Exception:
        # Some layers need what an earlier layer of the same kind has left for them.
        if len(set(kinds)) == len(kinds):
            raise
        return _run(decoder, layers, list(range(len(layers))))


def block_kinds(layers: nn.ModuleList) -> list[int]:
    """Return, for each decoder layer, the index of the first one with the same modules, shapes and settings."""
    first: dict[Any, int] = {}
    return [first.setdefault(_signature(block), index) for index, block in enumerate(layers)]


def _signature(block: nn.Module) -> Any:
    parts: list[Any] = []
    for path, module in block.named_modules():
        settings = tuple(
            sorted(
                (name, str(value))
                for name, value in vars(module).items()
                if (value is None or isinstance(value, bool | int | float | str))
                and not name.startswith(("_", "layer_i"))
            )
        )
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters(recurse=False))
        parts.append((path, type(module).__name__, settings, shapes))
    return tuple(parts)


def _run(decoder: PreTrainedModel, layers: nn.ModuleList, kinds: Sequence[int]) -> Record:
    recorder = _Recorder()
    with ExitStack() as stack:
        outputs: dict[int, Any] = {}
        for index, block in enumerate(layers):
            if kinds[index] == index:
                stack.enter_context(recorder.watching(index, block, outputs))
            else:
                stack.enter_context(_repeated(block, kinds[index], outputs))
        inside = {id(module) for module in layers.modules()}
        outside = {
            path: module
            for path, module in decoder.named_modules()
            if id(module) not in inside and is_norm(module)
        }
        normed = stack.enter_context(watching_norms(outside))
        stack.enter_context(torch.no_grad())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(recorder)
        result = decoder(input_ids=torch.zeros(1, NUM_TOKENS, dtype=torch.long), use_cache=False)
    returned = _first_tensor((result[0],), {})
    final = None if returned is None else _key(returned)
    final_norm = next((path for path, output in reversed(normed) if _key(output) == final), None)
    return Record([recorder.blocks[kind] for kind in kinds], final_norm)


@contextmanager
def watching_norms(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect the paths and outputs of `modules` in the order in which they run."""
    found: list[tuple[str, Tensor]] = []

    def after(path: str, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append((path, output))

    handles = [
        module.register_forward_hook(lambda _, __, output, path=path: after(path, output))
        for path, module in modules.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _repeated(block: nn.Module, kind: int, outputs: Mapping[int, Any]) -> Iterator[None]:
    """Let `block` return what the first one of its kind returned."""
    block.forward = lambda *_, **__: outputs[kind]
    try:
        yield
    finally:
        del block.forward  # the class's own method again


class _Recorder(TorchDispatchMode):
    """Notes the inputs of modules, and the additions of linears' outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocks: dict[int, BlockRecord] = {}
        self._alive: list[Tensor] = []  # a storage that is freed could be mistaken for the next one
        self._outputs: dict[int, tuple[BlockRecord, str, Tensor, int]] = {}
        self._readers: dict[Key, str] = {}

    @contextmanager
    def watching(self, index: int, block: nn.Module, outputs: dict[int, Any]) -> Iterator[None]:
        """Note what happens in a decoder layer, and its output in `outputs`."""
        record = self.blocks[index] = BlockRecord()

        def before(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = _first_tensor(args, kwargs)
            if tensor is None:
                return
            self._alive.append(tensor)
            if isinstance(module, nn.Linear) or is_experts(module):
                record.inputs.setdefault(path, _key(tensor))
            elif is_norm(module):
                self._readers.setdefault(_key(tensor), path)
            elif not path:
                self._readers.clear()  # those of the layer before

        def after(path: str, module: nn.Module, output: Any) -> None:
            if isinstance(module, nn.Linear) and isinstance(output, Tensor):
                self._alive.append(output)
                self._outputs[_storage(output)] = (record, path, output, output._version)
            elif not path:
                outputs[index] = output

        handles = []
        for path, module in block.named_modules():
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, path=path: before(path, module, args, kwargs),
                    with_kwargs=True,
                )
            )
            handles.append(
                module.register_forward_hook(lambda module, _, output, path=path: after(path, module, output))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs:
            first, second = args[:2]
            if isinstance(first, Tensor) and isinstance(second, Tensor):
                self._added(first, second)
                self._added(second, first)
        return func(*args, **(kwargs or {}))

    def _added(self, tensor: Tensor, other: Tensor) -> None:
        """Note that `tensor` and `other` are added."""
        record, path, output, version = self._outputs.get(_storage(tensor), (None, "", None, 0))
        if record is None or output is None or tensor.numel() != output.numel():
            return
        reader = self._readers.get(_key(other))
        if reader is not None and tensor._version == version:  # else it was changed in place meanwhile
            record.streams.setdefault(path, reader)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module may be a norm: it has no submodules and no matrices, and the name or a weight of one."""
    parameters = list(module.parameters(recurse=False))
    named = "norm" in type(module).__name__.lower()
    return not any(True for _ in module.children()) and (
        named or (bool(parameters) and all(parameter.dim() == 1 for parameter in parameters))
    )


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor among the arguments of a module; the first item of a tuple counts."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor):
            return first
    return None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _key(tensor: Tensor) -> Key:
    width = tensor.shape[-1] if tensor.dim() else 1
    return _storage(tensor), int(tensor.storage_offset()), width, tensor.numel(), tensor._version
