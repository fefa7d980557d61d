"""The only door for the packages above: pick a backend, repack a layer once, apply it.

Every backend computes through `torch.library` ops with fake implementations, so torch.compile and CUDA
graphs see through it. To add one: write a class with the four members of `LinearBackend` and its op beside it, and
name it in `backends()` (for the 8-bit head: `HeadBackend` and `head_backends()`), the fastest first.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from bwla_kernels.cpu.backend import CpuBackend
from bwla_kernels.cpu.head import CpuHead
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.head import TorchHead
from bwla_kernels.torch_backend import TorchBackend
from bwla_kernels.triton.backend import TritonBackend
from bwla_kernels.triton.head import TritonHead
from torch import Tensor


class LinearBackend(Protocol):
    """One way to compute a layer. Stateless: what `apply` needs is in the tensors that `prepare` returns."""

    name: str

    def can_implement(self, spec: LayerSpec, device: torch.device) -> tuple[bool, str]:
        """Whether this backend can run such a layer on `device`, and why (not)."""

    def prepare(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Turn a layer's stored tensors into those that `apply` uses (repacked once); mutates nothing.

        A bias passes through: callers may leave it out here and add it to `apply`'s tensors.
        """

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x, agreeing with `reference.linear`."""


class HeadBackend(Protocol):
    """One way to compute an 8-bit head; as `LinearBackend`."""

    name: str

    def can_implement(self, spec: HeadSpec, device: torch.device) -> tuple[bool, str]:
        """Whether this backend can run such a head on `device`, and why (not)."""

    def prepare(self, tensors: Mapping[str, Tensor], spec: HeadSpec) -> dict[str, Tensor]:
        """Turn the stored tensors into those that `apply` uses; mutates nothing."""

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: HeadSpec) -> Tensor:
        """x [..., K] -> [..., V] in the dtype of x, agreeing with `head.head_reference`."""


Chosen = TypeVar("Chosen", LinearBackend, HeadBackend)


@functools.cache
def backends() -> tuple[LinearBackend, ...]:
    """All backends of layers, the fastest first; the last one runs anything."""
    return (TritonBackend(), CpuBackend(), TorchBackend())


@functools.cache
def head_backends() -> tuple[HeadBackend, ...]:
    """All backends of the 8-bit head, likewise."""
    return (TritonHead(), CpuHead(), TorchHead())


def select_backend(
    spec: LayerSpec, device: torch.device, wanted: str | None = None
) -> tuple[LinearBackend, str]:
    """Choose the backend of a layer.

    Args:
        spec: the layer.
        device: where its tensors are.
        wanted: a backend's name, to force it.

    Returns: the backend, and a sentence that says why it and not a faster one (for the log).

    Raises:
        BackendError: the wanted backend does not exist or cannot run the layer.
    """
    return _select(
        backends(), lambda backend: backend.can_implement(spec, device), f"{spec} on {device}", wanted
    )


def select_head_backend(
    spec: HeadSpec, device: torch.device, wanted: str | None = None
) -> tuple[HeadBackend, str]:
    """Choose the backend of an 8-bit head; as `select_backend`, but a name that only layers know is no demand."""
    choices = head_backends()
    if wanted in {backend.name for backend in backends()} - {backend.name for backend in choices}:
        wanted = None
    return _select(
        choices, lambda backend: backend.can_implement(spec, device), f"{spec} on {device}", wanted
    )


def _select(
    choices: Sequence[Chosen],
    ask: Callable[[Chosen], tuple[bool, str]],
    what: str,
    wanted: str | None,
) -> tuple[Chosen, str]:
    table = {backend.name: backend for backend in choices}
    if wanted is not None:
        if wanted not in table:
            raise BackendError(f"backend {wanted!r} does not exist: choose one of {', '.join(table)}")
        able, reason = ask(table[wanted])
        if not able:
            raise BackendError(f"backend {wanted!r} cannot run {what}: {reason}")
        return table[wanted], f"backend {wanted} as asked for"
    refusals: list[str] = []
    for backend in choices:
        able, reason = ask(backend)
        if able:
            why = "; ".join([*refusals, reason])
            return backend, f"backend {backend.name} ({why})"
        refusals.append(f"not {backend.name}: {reason}")
    raise BackendError(f"no backend can run {what}: {'; '.join(refusals)}")
