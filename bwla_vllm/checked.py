"""A backend wrapper that compares another backend's output with the reference implementation (for `observe.py`).

It keeps the stored tensors beside the repacked ones, under prefixed names, so that they are registered, moved and
reloaded like all others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.head import head_reference
from torch import Tensor

MAX_ROWS = 32
"""Rows of a call that are compared, evenly spaced: the reference implementation is slow."""

_PREFIX = "reference_"


class ErrorRecorder(Protocol):
    """Decides which calls are compared and receives the results (implemented by `observe.Observer`)."""

    def wants(self, name: str) -> bool:
        """Return whether to check the next call of the layer called `name`."""

    def report(self, name: str, rows: int, error: float) -> None:
        """Record the largest relative error of that call over `rows` rows."""


def stored_name(name: str) -> str:
    """Return the name under which a stored tensor is kept for the comparison."""
    return _PREFIX + name


def stored_copy(name: str) -> bool:
    """Return whether a tensor of this name is kept only for the comparison."""
    return name.startswith(_PREFIX)


def largest_error(output: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a row: max over m of |output_m - expected_m| / |expected_m|, both [M, N].

    It is infinite where only `output` is not finite, or only `expected` is zero. Rows in which `expected` is not finite
    say nothing about this layer and are skipped.
    """
    finite = expected.isfinite().all(1)
    output, expected = output[finite].double(), expected[finite].double()
    error, size = (output - expected).norm(dim=1), expected.norm(dim=1)
    relative = torch.where(error == 0, error, error / size)
    return float(relative.nan_to_num(nan=float("inf"), posinf=float("inf")).max()) if len(relative) else 0.0


def sample_rows(x: Tensor) -> Tensor:
    """Return the indices of at most `MAX_ROWS` evenly spaced rows of x [M, K], first and last included."""
    count = min(len(x), MAX_ROWS)
    return torch.linspace(0, len(x) - 1, count, dtype=torch.float64).round().long().to(x.device)


def reference_output(
    x: Tensor, stored: Mapping[str, Tensor], bias: Tensor | None, spec: LayerSpec | HeadSpec
) -> Tensor:
    """Compute [M, N] from x [M, K] with `reference.linear`, or `head_reference` for a head."""
    if isinstance(spec, HeadSpec):
        return head_reference(x, stored["weight_int8"], stored["weight_scale"])
    if bias is None:
        return reference.linear(x, stored, spec)
    return reference.linear(x, {**stored, "bias": bias}, replace(spec, bias=True))


@dataclass(frozen=True)
class Checked:
    """A backend whose output is compared with the reference.

    Attributes:
        backend: the backend that computes the layer.
        layer: the layer's name.
        recorder: receives the errors.
    """

    backend: Any
    layer: str
    recorder: ErrorRecorder

    @property
    def name(self) -> str:
        """The name of the wrapped backend."""
        return str(self.backend.name)

    def can_implement(self, spec: Any, device: torch.device) -> tuple[bool, str]:
        """Return the answer of the wrapped backend."""
        answer: tuple[bool, str] = self.backend.can_implement(spec, device)
        return answer


class CheckedBackend(Checked):
    """Wrap a backend (`ops.LinearBackend` or `ops.HeadBackend`) and compare its output with the reference."""

    def prepare(self, tensors: Mapping[str, Tensor], spec: Any) -> dict[str, Tensor]:
        """Return the tensors of the wrapped backend, and the stored ones under prefixed names."""
        prepared = self.backend.prepare(tensors, spec)
        return {**prepared, **{stored_name(name): tensor for name, tensor in tensors.items()}}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: Any) -> Tensor:
        """Compute x [..., K] -> [..., N] with the wrapped backend, and check some rows if the recorder wants them."""
        own = {name: tensor for name, tensor in tensors.items() if not stored_copy(name)}
        y: Tensor = self.backend.apply(x, own, spec)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) and self.recorder.wants(self.layer):
            stored = {key.removeprefix(_PREFIX): value for key, value in tensors.items() if stored_copy(key)}
            sampled = sample_rows(rows)
            expected = reference_output(rows[sampled], stored, own.get("bias"), spec)
            error = largest_error(y.reshape(len(rows), -1)[sampled], expected)
            self.recorder.report(self.layer, len(sampled), error)
        return y
