"""The only door for the packages above: pick a backend, repack a layer once, apply it.

Every backend computes through `torch.library` ops with fake implementations, so torch.compile and CUDA
graphs see through it. To add one: write a class with the four members of `Backend` and its op beside it, and
name it in `backends()`, the fastest first.
"""

import functools
from collections.abc import Mapping
from typing import Protocol

import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.torch_backend import TorchBackend
from torch import Tensor


class Backend(Protocol):
    """One way to compute a layer. Stateless: what `apply` needs is in the tensors that `prepare` returns."""

    name: str

    def can_implement(self, spec: LayerSpec, device: torch.device) -> tuple[bool, str]:
        """Whether this backend can run such a layer on `device`, and why (not)."""

    def prepare(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Turn a layer's stored tensors into those that `apply` uses (repacked once); mutates nothing."""

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x, agreeing with `reference.linear`."""


@functools.cache
def backends() -> tuple[Backend, ...]:
    """All backends, the fastest first; the last one runs anything."""
    return (TorchBackend(),)


def select_backend(spec: LayerSpec, device: torch.device, wanted: str | None = None) -> tuple[Backend, str]:
    """Choose the backend of a layer.

    Args:
        spec: the layer.
        device: where its tensors are.
        wanted: a backend's name, to force it.

    Returns: the backend, and a sentence that says why it and not a faster one (for the log).

    Raises:
        BackendError: the wanted backend does not exist or cannot run the layer.
    """
    table = {backend.name: backend for backend in backends()}
    if wanted is not None:
        if wanted not in table:
            raise BackendError(f"backend {wanted!r} does not exist: choose one of {', '.join(table)}")
        able, reason = table[wanted].can_implement(spec, device)
        if not able:
            raise BackendError(f"backend {wanted!r} cannot run {spec} on {device}: {reason}")
        return table[wanted], f"backend {wanted} as asked for"
    refusals: list[str] = []
    for backend in backends():
        able, reason = backend.can_implement(spec, device)
        if able:
            why = f" ({'; '.join(refusals)})" if refusals else f" ({reason})"
            return backend, f"backend {backend.name}{why}"
        refusals.append(f"not {backend.name}: {reason}")
    raise BackendError(f"no backend can run {spec} on {device}: {'; '.join(refusals)}")
