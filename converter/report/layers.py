"""The parts of the report's page that show layers: panels by kind of layer, and every layer block by block."""

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from bwla_converter.checkpoint.contents import kind_of
from bwla_converter.report.charts import histogram_panel

_BLOCK = re.compile(r"\.(\d+)\.")


def block_of(name: str) -> int:
    """Number of the decoder block that a linear belongs to; 0 where its name has none."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else 0


def layer_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Kind of layer, in order of appearance -> its names, by block."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(kind_of(name), []).append(name)
    return {kind: sorted(members, key=block_of) for kind, members in groups.items()}


def weight_panels(changes: Mapping[str, Any], groups: Mapping[str, list[str]]) -> str:
    """A panel for each kind of layer."""
    panels = "".join(
        _panel(_mean([changes[name] for name in names]), f"{kind} ({len(names)})", _weight_caption)
        for kind, names in groups.items()
    )
    return f'<div class="panels">{panels}</div>'


def activation_panels(changes: Mapping[str, Any], groups: Mapping[str, list[str]]) -> str:
    """A panel for each kind of input, named by the first linear that reads it."""
    panels = "".join(
        _panel(
            _mean([changes[name] for name in names]),
            f"input of {kind} ({len(names)})",
            _activation_caption,
            log=True,
        )
        for kind, names in groups.items()
    )
    return f'<div class="panels">{panels}</div>'


def layer_details(report: Mapping[str, Any]) -> str:
    """Every layer in a fold for each block."""
    weights = report["statistics"].get("weights", {})
    inputs = report["statistics"].get("activations", {})
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for layer in report["layers"]:
        blocks.setdefault(block_of(layer["name"]), []).append(layer)
    return "".join(
        f"<details><summary>Block {block}<small>mean error "
        f"{sum(layer['error'] for layer in layers) / len(layers):.3f}, {len(layers)} layers</small></summary>"
        f"{_table(layers, weights)}{_block_panels(layers, weights, inputs)}</details>"
        for block, layers in sorted(blocks.items())
    )


def _table(layers: Iterable[Mapping[str, Any]], weights: Mapping[str, Any]) -> str:
    rows = []
    for layer in layers:
        cells = [escape(layer["name"]), f"{layer['weights']:,}", f"{layer['error']:.4f}"]
        change = weights.get(layer["name"])
        if change:
            cells += [_arrow(change, "kurtosis"), _arrow(change, "bimodality", 3)]
            cells.append(_arrow(change, "binarization_error", 3))
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    titles = ["layer", "weights", "relative error"]
    titles += ["kurtosis", "bimodality", "lost by signs"] if weights else []
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _block_panels(
    layers: Iterable[Mapping[str, Any]], weights: Mapping[str, Any], inputs: Mapping[str, Any]
) -> str:
    panels = []
    for layer in layers:
        name = layer["name"]
        if name in inputs:
            panels.append(_panel(inputs[name], f"input of {kind_of(name)}", _activation_caption, log=True))
        if name in weights:
            panels.append(_panel(weights[name], kind_of(name), _weight_caption))
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def _panel(change: Mapping[str, Any], title: str, caption: Any, log: bool = False) -> str:
    before, after = change["before"], change["after"]
    drawing = histogram_panel(before["histogram"], after["histogram"], before["span"], title, log=log)
    return f"<figure>{drawing}<figcaption>{caption(change)}</figcaption></figure>"


def _weight_caption(change: Mapping[str, Any]) -> str:
    return (
        f"kurtosis {_arrow(change, 'kurtosis')}<br>bimodality {_arrow(change, 'bimodality', 3)}<br>"
        f"lost by signs {_arrow(change, 'binarization_error', 3)}"
    )


def _activation_caption(change: Mapping[str, Any]) -> str:
    return (
        f"max / rms {_arrow(change, 'peak', 1)}<br>99 % of tokens below {_arrow(change, 'peak_p99', 1)}<br>"
        f"kurtosis {_arrow(change, 'kurtosis', 1)}<br>bimodality {_arrow(change, 'bimodality', 3)}"
    )


def _arrow(change: Mapping[str, Any], figure: str, digits: int = 2) -> str:
    before, after = change["before"][figure], change["after"][figure]
    return f"{before:,.{digits}f} → <b>{after:,.{digits}f}</b>"


def _mean(changes: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The mean of several changes, figure by figure and bin by bin."""

    def mean(values: list[Any]) -> Any:
        if isinstance(values[0], list):
            return [sum(column) / len(values) for column in zip(*values, strict=True)]
        return sum(values) / len(values)

    return {
        side: {key: mean([change[side][key] for change in changes]) for key in changes[0][side]}
        for side in ("before", "after")
    }
