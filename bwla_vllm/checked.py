"""Backends that compare what another backend computes with the definition; for `observe.py`.

Beside the repacked tensors they keep the stored ones, under names of their own, so that they are registered,
moved and reloaded like all others.
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
"""Rows of a call that are compared, evenly spaced: the definition is slow."""

_PREFIX = "definition_"


class Report(Protocol):
    """Who wants to know (observe.Observer)."""

    def wants(self, name: str) -> bool:
        """Whether the next call of the layer called `name` is to be checked."""

    def report(self, name: str, rows: int, error: float) -> None:
        """That call's worst relative error over `rows` rows."""


def stored_copy(name: str) -> bool:
    """Whether a tensor of this name is there for the comparison alone."""
    return name.startswith(_PREFIX)


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """Largest relative error of a row: max over m of |found_m - wanted_m| / |wanted_m|, both [M, N].

    Infinite where only `found` is not finite, or only `wanted` is zero; rows in which `wanted` is not finite
    say nothing about this layer and are left out.
    """
    sound = wanted.isfinite().all(1)
    found, wanted = found[sound].double(), wanted[sound].double()
    error, size = (found - wanted).norm(dim=1), wanted.norm(dim=1)
    relative = torch.where(error == 0, error, error / size)
    return float(relative.nan_to_num(nan=float("inf"), posinf=float("inf")).max()) if len(relative) else 0.0


def sample_rows(x: Tensor) -> Tensor:
    """Indices of at most `MAX_ROWS` rows of x [M, K], with the first and the last."""
    count = min(len(x), MAX_ROWS)
    return torch.linspace(0, len(x) - 1, count, dtype=torch.float64).round().long().to(x.device)


def definition(
    x: Tensor, stored: Mapping[str, Tensor], bias: Tensor | None, spec: LayerSpec | HeadSpec
) -> Tensor:
    """What x [M, K] should become, [M, N]: by `reference.linear`, or `head_reference` for a head."""
    if isinstance(spec, HeadSpec):
        return head_reference(x, stored["weight_int8"], stored["weight_scale"])
    if bias is None:
        return reference.linear(x, stored, spec)
    return reference.linear(x, {**stored, "bias": bias}, replace(spec, bias=True))


@dataclass(frozen=True)
class Checked:
    """A backend (`ops.LinearBackend` or `ops.HeadBackend`), watched.

    Attributes:
        backend: what computes.
        layer: the layer's name.
        to: who is told.
    """

    backend: Any
    layer: str
    to: Report

    @property
    def name(self) -> str:
        """The backend's own name."""
        return str(self.backend.name)

    def can_implement(self, spec: Any, device: torch.device) -> tuple[bool, str]:
        """As the backend says."""
        answer: tuple[bool, str] = self.backend.can_implement(spec, device)
        return answer

    def prepare(self, tensors: Mapping[str, Tensor], spec: Any) -> dict[str, Tensor]:
        """The backend's tensors, and the stored ones beside them."""
        prepared = self.backend.prepare(tensors, spec)
        return {**prepared, **{_PREFIX + name: tensor for name, tensor in tensors.items()}}

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: Any) -> Tensor:
        """x [..., K] -> [..., N], as the backend computes it."""
        own = {name: tensor for name, tensor in tensors.items() if not stored_copy(name)}
        y: Tensor = self.backend.apply(x, own, spec)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) and self.to.wants(self.layer):
            stored = {key.removeprefix(_PREFIX): value for key, value in tensors.items() if stored_copy(key)}
            picked = sample_rows(rows)
            wanted = definition(rows[picked], stored, own.get("bias"), spec)
            self.to.report(self.layer, len(picked), largest_error(y.reshape(len(rows), -1)[picked], wanted))
        return y
