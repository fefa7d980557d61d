"""Public kernel API: choose a backend, repack a layer once, apply it.

Every backend computes through `torch.library` ops with fake implementations, which torch.compile and CUDA graphs can
trace. To add one, implement `LinearBackend` and its op, and list it in `backends()`, the fastest first (for the 8-bit
head: `HeadBackend` and `head_backends()`; for experts: `ExpertsBackend` and `experts_backends()`); see
docs/developer/adding-a-kernel-backend.md.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from bwla_kernels.cpu.backend import CpuBackend
from bwla_kernels.cpu.experts import CpuExperts
from bwla_kernels.cpu.head import CpuHead
from bwla_kernels.errors import BackendError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.torch_backend import TorchExperts
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.head import TorchHead
from bwla_kernels.torch_backend import TorchBackend
from bwla_kernels.triton.backend import TritonBackend
from bwla_kernels.triton.experts_backend import TritonExperts
from bwla_kernels.triton.head import TritonHead
from torch import Tensor


class LinearBackend(Protocol):
    """A way to compute a layer. Stateless: everything that `apply` needs is in the tensors that `prepare` returns."""

    name: str

    def can_implement(self, spec: LayerSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether this backend can run such a layer on `device`, and the reason."""

    def prepare(self, tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
        """Repack a layer's stored tensors, once, into those that `apply` uses; modify none of them.

        A bias passes through: callers may leave it out here and add it to the tensors of `apply`.
        """

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
        """Compute x [..., K] -> [..., N] in the dtype of x, in agreement with `reference.linear`."""


class HeadBackend(Protocol):
    """A way to compute an 8-bit head; stateless like `LinearBackend`."""

    name: str

    def can_implement(self, spec: HeadSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether this backend can run such a head on `device`, and the reason."""

    def prepare(self, tensors: Mapping[str, Tensor], spec: HeadSpec) -> dict[str, Tensor]:
        """Repack the stored tensors, once, into those that `apply` uses; modify none of them.

        The result contains `weight_int8` [V, K] and `weight_scale` [V] with the stored values: an embedding that is
        tied to the head looks its rows up in them.
        """

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: HeadSpec) -> Tensor:
        """Compute x [..., K] -> [..., V] in the dtype of x, in agreement with `head.head_reference`."""


class ExpertsBackend(Protocol):
    """A way to compute the experts of a mixture-of-experts layer; stateless like `LinearBackend`."""

    name: str

    def can_implement(self, spec: ExpertsSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether this backend can run such experts on `device`, and the reason."""

    def prepare(
        self, gate_up: Mapping[str, Tensor], down: Mapping[str, Tensor], spec: ExpertsSpec
    ) -> dict[str, Tensor]:
        """Repack the stacked tensors, once, into those that `apply` uses; modify none of them."""

    def apply(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        tensors: Mapping[str, Tensor],
        spec: ExpertsSpec,
    ) -> Tensor:
        """Compute x [M, H] -> [M, H] in the dtype of x, in agreement with `experts.reference.binary_experts`."""


AnyBackend = TypeVar("AnyBackend", LinearBackend, HeadBackend, ExpertsBackend)


@functools.cache
def backends() -> tuple[LinearBackend, ...]:
    """Return all backends for linear layers, the fastest first; the last one runs any layer."""
    return (TritonBackend(), CpuBackend(), TorchBackend())


@functools.cache
def head_backends() -> tuple[HeadBackend, ...]:
    """Return all backends for the 8-bit head, the fastest first; the last one runs any head."""
    return (TritonHead(), CpuHead(), TorchHead())


@functools.cache
def experts_backends() -> tuple[ExpertsBackend, ...]:
    """Return all backends for experts, the fastest first; the last one runs any experts."""
    return (TritonExperts(), CpuExperts(), TorchExperts())


def select_backend(
    spec: LayerSpec, device: torch.device, requested: str | None = None
) -> tuple[LinearBackend, str]:
    """Choose the backend of a layer.

    Args:
        spec: the layer.
        device: the device of its tensors.
        requested: name of a backend to use instead of the fastest.

    Returns: the backend, and a sentence for the log that explains the choice.

    Raises:
        BackendError: the requested backend does not exist or cannot run the layer.
    """
    return _select(
        backends(), lambda backend: backend.can_implement(spec, device), f"{spec} on {device}", requested
    )


def select_head_backend(
    spec: HeadSpec, device: torch.device, requested: str | None = None
) -> tuple[HeadBackend, str]:
    """Choose the backend of an 8-bit head, as `select_backend` does.

    A requested backend without a head implementation is ignored.
    """
    choices = head_backends()
    if requested in {backend.name for backend in backends()} - {backend.name for backend in choices}:
        requested = None
    return _select(
        choices, lambda backend: backend.can_implement(spec, device), f"{spec} on {device}", requested
    )


def select_experts_backend(
    spec: ExpertsSpec, device: torch.device, requested: str | None = None
) -> tuple[ExpertsBackend, str]:
    """Choose the backend of a layer's experts, as `select_backend` does; only their own backends may be requested."""
    return _select(
        experts_backends(),
        lambda backend: backend.can_implement(spec, device),
        f"{spec} on {device}",
        requested,
    )


def _select(
    choices: Sequence[AnyBackend],
    can_implement: Callable[[AnyBackend], tuple[bool, str]],
    what: str,
    requested: str | None,
) -> tuple[AnyBackend, str]:
    by_name = {backend.name: backend for backend in choices}
    if requested is not None:
        if requested not in by_name:
            raise BackendError(f"backend {requested!r} does not exist: choose one of {', '.join(by_name)}")
        able, reason = can_implement(by_name[requested])
        if not able:
            raise BackendError(f"backend {requested!r} cannot run {what}: {reason}")
        return by_name[requested], f"backend {requested} as requested"
    refusals: list[str] = []
    for backend in choices:
        able, reason = can_implement(backend)
        if able:
            why = "; ".join([*refusals, reason])
            return backend, f"backend {backend.name} ({why})"
        refusals.append(f"not {backend.name}: {reason}")
    raise BackendError(f"no backend can run {what}: {'; '.join(refusals)}")
