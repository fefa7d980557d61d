"""Load-time summary, plus an optional comparison of every layer with the reference implementation.

`BWLA_CHECK_LAYERS=N vllm serve ... --enforce-eager` compares each layer's output in its first N calls
(including those of vLLM's warm-up) with `bwla_kernels.reference`, and logs the worst layer after each pass. The stored
tensors then stay in memory beside the repacked ones, and a pass takes seconds.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from itertools import groupby
from typing import TYPE_CHECKING, Any

from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HeadSpec
from torch import Tensor
from vllm.logger import init_logger

from bwla_vllm.errors import StartError

if TYPE_CHECKING:  # imported by every vLLM process, so nothing that brings the kernels
    from bwla_kernels.ops import ExpertsBackend, HeadBackend, LinearBackend

logger = init_logger("vllm.bwla")

CHECK_VARIABLE = "BWLA_CHECK_LAYERS"
"""Environment variable with the number of calls of every layer to check; read once, when the config is created."""

SUSPICIOUS = 0.05
"""Relative error of a row above which a layer is reported as wrong. A rounding tie that is resolved differently changes
one code of a row (1% of a row of 64 columns, far less of a wide one); rounding to bfloat16 changes outputs by 0.4%."""


@dataclass(frozen=True)
class LoadedLayer:
    """Summary of one layer that is ready to compute.

    Attributes:
        kind: last part of its name.
        size: "N x K" in this process; for E experts, "E x (2 I x H + H x I)".
        backend, variant: name of the backend, and its instruction set or compute capability.
        numbers: bits of weights and activations.
        weights: N K.
        stored_bytes: memory of everything that the backend keeps for it.
        seconds: time to check and repack it.
    """

    kind: str
    size: str
    backend: str
    variant: str
    numbers: str
    weights: int
    stored_bytes: int
    seconds: float

    @property
    def group(self) -> tuple[str, ...]:
        """The fields in which layers agree that share a row of the table."""
        return self.kind, self.size, self.backend, self.variant, self.numbers


def describe(
    name: str,
    backend: "LinearBackend | HeadBackend | ExpertsBackend",
    spec: LayerSpec | HeadSpec | ExpertsSpec,
    tensors: Mapping[str, Tensor],
    seconds: float,
) -> LoadedLayer:
    """Summarize a layer whose repacked tensors are `tensors`."""
    from bwla_vllm.checked import stored_copy

    device = next(iter(tensors.values())).device
    size, numbers, weights = _sizes(spec)
    return LoadedLayer(
        name.removesuffix(".routed_experts").rpartition(".")[2],
        size,
        backend.name,
        backend.can_implement(spec, device)[1],  # type: ignore[arg-type]
        numbers,
        weights,
        sum(tensor.nbytes for key, tensor in tensors.items() if not stored_copy(key)),
        seconds,
    )


def _sizes(spec: LayerSpec | HeadSpec | ExpertsSpec) -> tuple[str, str, int]:
    """Return the size of a layer, its bits, and its number of weights; of experts, gate and up are one linear."""
    if isinstance(spec, ExpertsSpec):
        parts = (spec.gate_up, spec.down)
        ranks = "/".join(str(rank) for rank in dict.fromkeys(part.rank for part in parts))
        return (
            f"{spec.experts} x ({' + '.join(_sizes(part)[0] for part in parts)})",
            f"W1A{spec.gate_up.bits} rank {ranks}",
            spec.experts * sum(_sizes(part)[2] for part in parts),
        )
    numbers = "W8A16" if isinstance(spec, HeadSpec) else f"W1A{spec.bits} rank {spec.rank}"
    return f"{spec.out_features} x {spec.in_features}", numbers, spec.out_features * spec.in_features


def load_table(layers: list[LoadedLayer]) -> str:
    """Format the table that is logged once a model is loaded: one row per kind of layer, in the order of the model."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "backend", "variant", "format"):
        table.add_column(heading, no_wrap=True)
    for heading in ("layers", "N x K", "MB", "bits/weight", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(first: tuple[str, str, str, str], size: str, members: list[LoadedLayer]) -> None:
        stored, weights = (sum(getattr(one, what) for one in members) for what in ("stored_bytes", "weights"))
        seconds = sum(one.seconds for one in members)
        figures = f"{stored / 1e6:.1f}", f"{8 * stored / weights:.2f}", f"{seconds:.2f}"
        table.add_row(*first, str(len(members)), size, *figures)

    order = list(dict.fromkeys(one.group for one in layers))
    for _, group in groupby(
        sorted(layers, key=lambda one: order.index(one.group)), key=lambda one: one.group
    ):
        members = list(group)
        one = members[0]
        add((one.kind, one.backend, one.variant, one.numbers), one.size, members)
    add(("all", "", "", ""), "", layers)
    text = StringIO()
    Console(file=text, width=200, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def calls_to_check() -> int:
    """Return the number in `BWLA_CHECK_LAYERS`, 0 if it is unset.

    Raises:
        StartError: it is not a number.
    """
    text = os.environ.get(CHECK_VARIABLE, "").strip() or "0"
    if not text.isdecimal():
        raise StartError(
            f"{CHECK_VARIABLE}: expected a number of calls like 2, found {text!r}: correct or unset the "
            "environment variable"
        )
    return int(text)


class Observer:
    """Collect summaries and errors of the layers of one model, in one process.

    Args:
        calls: number of calls of every layer to compare with the reference implementation.
    """

    def __init__(self, calls: int = 0) -> None:
        self.calls = calls
        self._expected: set[str] = set()
        self._loaded: list[LoadedLayer] = []
        self._watched: dict[str, set[str]] = {}
        self._errors: dict[tuple[str, int], dict[str, float]] = {}

    def expect(self, name: str) -> None:
        """Announce a layer; the table is logged once all announced layers are loaded."""
        self._expected.add(name)

    def loaded(self, name: str, *about: Any) -> None:
        """Record that a layer is ready (arguments as for `describe`), and log the table after the last one.

        Weights that are reloaded while serving are not announced again, and are ignored here.
        """
        if name not in self._expected:
            return
        self._expected.discard(name)
        self._loaded.append(describe(name, *about))
        if not self._expected:
            logger.info("BWLA layers in this process:\n%s", load_table(self._loaded))
            self._loaded = []

    def watch_layer(self, backend: "LinearBackend", name: str) -> "LinearBackend":
        """Return the backend itself, or, if checks are enabled, a wrapper that compares it with the reference.

        Raises:
            StartError: checks are enabled, but the model is compiled.
        """
        return self._checked(backend, name) if self._watches(name, "layers") else backend

    def watch_head(self, backend: "HeadBackend", name: str) -> "HeadBackend":
        """Do the same for the head, see `watch_layer`."""
        return self._checked(backend, name) if self._watches(name, "heads") else backend

    def watch_experts(self, backend: "ExpertsBackend", name: str) -> "ExpertsBackend":
        """Do the same for the experts of a layer, see `watch_layer`."""
        if not self._watches(name, "groups of experts"):
            return backend
        from bwla_vllm.moe.checked import CheckedExperts

        checked: Any = CheckedExperts(backend, name, self)
        return checked  # type: ignore[no-any-return]

    def wants(self, name: str) -> bool:
        """Return whether to check the next call of the layer called `name`."""
        return len(self._calls_of(name)) < self.calls

    def report(self, name: str, rows: int, error: float) -> None:
        """Record the error of a layer's call; log the worst layer once all layers of its group have made this call."""
        (group,) = [group for group, names in self._watched.items() if name in names]
        call = len(self._calls_of(name)) + 1
        errors = self._errors.setdefault((group, call), {})
        errors[name] = error
        if len(errors) < len(self._watched[group]):
            return
        worst = max(errors, key=lambda one: errors[one])
        wrong = [one for one in errors if errors[one] > SUSPICIOUS]
        message = (
            f"{CHECK_VARIABLE}: call {call} of {self.calls}, {len(errors)} {group}, {rows} rows: worst {worst}, "
            f"relative error {errors[worst]:.2g}"
        )
        if wrong:
            logger.error("%s; these differ from the reference implementation: %s", message, ", ".join(wrong))
        else:
            logger.info("%s", message)

    def _checked(self, backend: Any, name: str) -> Any:
        from bwla_vllm.checked import CheckedBackend

        return CheckedBackend(backend, name, self)

    def _calls_of(self, name: str) -> list[int]:
        return [call for (_, call), errors in self._errors.items() if name in errors]

    def _watches(self, name: str, group: str) -> bool:
        if not self.calls:
            return False
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is not None and config.model_config is not None and not config.model_config.enforce_eager:
            raise StartError(
                f"{CHECK_VARIABLE} checks layers one by one, which is not possible in a compiled model: "
                "add --enforce-eager, or unset the environment variable"
            )
        if not self._watched:
            logger.info(
                "%s=%d: layers are compared with the reference implementation, which is slow",
                CHECK_VARIABLE,
                self.calls,
            )
        self._watched.setdefault(group, set()).add(name)
        return True
