"""Histogram panels of weights and activations, by kind of linear and for every decoder layer."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bwla_kernels.format.experts import kind_of

_LAYER = re.compile(r"\.(\d+)\.")

LEFT, RIGHT, TOP, BOTTOM = 6, 224, 24, 128
"""Where a panel's drawing of 230 x 150 has its histograms; the macro `panel` knows them too."""

SMALLEST_SHARE = 1e-6
"""Lower end of a panel's logarithmic axis."""

WEIGHT_FIGURES = (
    ("kurtosis", "kurtosis", 2),
    ("bimodality", "bimodality", 3),
    ("binarization error", "binarization_error", 3),
)
ACTIVATION_FIGURES = (
    ("max / rms", "peak", 1),
    ("99 % of tokens below", "peak_p99", 1),
    ("kurtosis", "kurtosis", 1),
    ("bimodality", "bimodality", 3),
)
"""Label, attribute of `statistics.Distribution` and digits of the figures below a panel."""


@dataclass(frozen=True)
class Panel:
    """Two histograms in one drawing, with figures below it.

    Attributes:
        title: of the drawing.
        change: the distributions before and after, see `statistics.Change`, as plain data.
        before, after: outlines of the two histograms, as SVG path commands.
        ticks: x, label and alignment of the ticks.
        figures: label, name and digits of each figure to show.
    """

    title: str
    change: Mapping[str, Any]
    before: str
    after: str
    ticks: Sequence[Mapping[str, Any]]
    figures: Sequence[tuple[str, str, int]]


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer's linears, as the report has them, and their panels."""

    index: int
    linears: Sequence[Mapping[str, Any]]
    panels: Sequence[Panel]

    @property
    def mean_error(self) -> float:
        """Mean relative error of the linears."""
        return sum(float(linear["error"]) for linear in self.linears) / len(self.linears)


def layer_of(name: str) -> int:
    """Return the index of the decoder layer that a linear belongs to; 0 if its name has none."""
    match = _LAYER.search(name)
    return int(match[1]) if match else 0


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names of linears by their kind, in order of appearance; each list is sorted by decoder layer."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(name)
    return {kind: sorted(members, key=layer_of) for kind, members in groups.items()}


def weight_panel(title: str, changes: Sequence[Mapping[str, Any]]) -> Panel:
    """Return the panel of the mean of some weights' distributions."""
    change = _mean(changes)
    sides = _outlines(change, log=False)
    return Panel(title, change, *sides, _ticks(change["before"]["span"]), WEIGHT_FIGURES)


def activation_panel(title: str, changes: Sequence[Mapping[str, Any]]) -> Panel:
    """Return the panel of the mean of some inputs' distributions, on a logarithmic scale that shows the tails."""
    change = _mean(changes)
    sides = _outlines(change, log=True)
    return Panel(f"input of {title}", change, *sides, _ticks(change["before"]["span"]), ACTIVATION_FIGURES)


def decoder_layers(report: Mapping[str, Any]) -> list[DecoderLayer]:
    """Return all decoder layers with their linears; each linear gets its `change`, or None."""
    weights = report["statistics"].get("weights", {})
    inputs = report["statistics"].get("activations", {})
    linears: dict[int, list[Mapping[str, Any]]] = {}
    panels: dict[int, list[Panel]] = {}
    for linear in report["linears"]:
        name, index = linear["name"], layer_of(linear["name"])
        linears.setdefault(index, []).append({**linear, "change": weights.get(name)})
        shown = panels.setdefault(index, [])
        if name in inputs:
            shown.append(activation_panel(kind_of(name), [inputs[name]]))
        if name in weights:
            shown.append(weight_panel(kind_of(name), [weights[name]]))
    return [DecoderLayer(index, linears[index], panels[index]) for index in sorted(linears)]


def _outlines(change: Mapping[str, Any], log: bool) -> tuple[str, str]:
    """Return the outlines of both histograms; the highest bin of the two reaches the top of the drawing."""
    histograms = [change[side]["histogram"] for side in ("before", "after")]
    highest: float = max(SMALLEST_SHARE, *map(max, histograms))

    def height(share: float) -> float:
        if log:
            return math.log(max(share, SMALLEST_SHARE) / SMALLEST_SHARE) / math.log(highest / SMALLEST_SHARE)
        return share / highest

    def outline(shares: Sequence[float]) -> str:
        width = (RIGHT - LEFT) / len(shares)
        return "".join(
            f"V{BOTTOM - height(share) * (BOTTOM - TOP):.1f}H{LEFT + (index + 1) * width:.1f}".replace(
                ".0", ""
            )
            for index, share in enumerate(shares)
        )

    before, after = map(outline, histograms)
    return before, after


def _ticks(span: float) -> list[dict[str, Any]]:
    """Return the ticks of a panel over [-span, span]."""
    quarter = (RIGHT - LEFT) / 4
    anchors = ("start", "middle", "middle", "middle", "end")
    return [
        {"x": f"{LEFT + index * quarter:g}", "label": f"{span * (index / 2 - 1):g}", "anchor": anchor}
        for index, anchor in enumerate(anchors)
    ]


def _mean(changes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the mean of several changes, figure by figure and bin by bin."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], list):
            return [sum(column) / len(values) for column in zip(*values, strict=True)]
        return sum(values) / len(values)

    return {
        side: {key: mean([change[side][key] for change in changes]) for key in changes[0][side]}
        for side in ("before", "after")
    }
