"""The report as one HTML page without scripts or network access, for light and dark mode; see `data.build_report`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bwla_converter.checkpoint.contents import describe_weights
from bwla_converter.common.durations import duration
from bwla_converter.report.charts import COLOURS, WIDTH, Series, line_chart
from bwla_converter.report.layers import (
    Panel,
    activation_panel,
    by_kind,
    decoder_layers,
    layer_of,
    weight_panel,
)
from bwla_converter.report.templating import environment
from bwla_kernels.format.experts import kind_of
from markupsafe import Markup
from rich.filesize import decimal

Report = Mapping[str, Any]

DIAL_WIDTHS = {"wide": WIDTH, "narrow": 340}
"""CSS class -> width of the drawing of size and loss: one for phones, which show all of it, beside one for screens."""

OBJECTIVES = {
    "okt": (
        "nats per weight",
        "Negative log-likelihood of the rotated rows under two mirrored Gaussians, for groups in one plane",
    ),
    "moment": ("mean |w|^5", "Fifth absolute moment of the rotated rows, for groups in several planes"),
}
"""Name of an objective of rotations in the traces -> title of its axis, and what it is."""

LOG_FROM = 5
"""Ratio of the largest loss to the smallest from which the axis is logarithmic; it then has at least two ticks."""


def render_page(report: Report) -> str:
    """Return the text of the page."""
    sizes = report["bytes"]
    kinds = kind_colours(report, (linear["name"] for linear in report["linears"]))
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            base=report["provenance"]["base_model"] or "a model",
            what=describe_weights(report["planes"]),
            tiles=_tiles(report),
            dial=_dial(report),
            dial_drawing=_dial_drawing(report),
            planes_chart=_planes_chart(report, kinds),
            bit_colours=colours_of(report["bits"]),
            byte_colours=colours_of(sizes["before"]),
            most_bytes=max(sum(part.values()) for part in sizes.values()),
            worst=sorted(report["linears"], key=lambda linear: -linear["error"])[:5],
            kind_colours=kinds,
            error_chart=_error_chart(report, kinds),
            objectives=_objectives(report),
            weights=_weights(report),
            activations=_activations(report),
            origin=_origin(report),
            layers=decoder_layers(report),
        )
    )


def colours_of(names: Iterable[str]) -> dict[str, int]:
    """Return a colour for each name, in order of appearance."""
    return {name: index % COLOURS for index, name in enumerate(dict.fromkeys(names))}


def kind_colours(report: Report, names: Iterable[str]) -> dict[str, int]:
    """Return the colours of the kinds of these linears: a kind has the same colour on the whole page."""
    colours = colours_of(kind_of(linear["name"]) for linear in report["linears"])
    return {kind: colours[kind] for kind in dict.fromkeys(map(kind_of, names))}


def _tiles(report: Report) -> list[tuple[str, str]]:
    """Return the figures at the top of the page, each with its text."""
    errors = [linear["error"] for linear in report["linears"]]
    bits = report["activation_bits"]
    tiles = [
        (f"{report['bits_per_weight']:.3f}", "bits per quantized weight, everything counted"),
        (f"{report['bytes_before'] / report['bytes_after']:.2f}x", "smaller, the whole model"),
        ("not quantized" if bits == 16 else f"{bits} bits", "activations"),
        (f"{report['head_bits']} bits", "language-model head"),
        (f"{report['embedding_bits']} bits", "embedding"),
        (f"{sum(errors) / len(errors):.3f}", f"mean relative error of {len(errors)} linears"),
        (duration(report["seconds"]), "conversion time"),
        (decimal(report["memory"]["cpu"]), "peak memory of the process"),
    ]
    if report.get("measured_loss") is not None:
        text = f"{report['loss_unit']} lost, measured; {report['predicted_loss']:.3g} predicted"
        tiles.insert(1, (f"{report['measured_loss']:.3g}", text))
    if "gpu" in report["memory"]:
        tiles.append((decimal(report["memory"]["gpu"]), "peak memory on a GPU"))
    return tiles


def _dial(report: Report) -> list[tuple[float, float, bool]]:
    """Return (bits per weight, predicted loss, whether it is this conversion) by size; empty without predictions."""
    if report.get("predicted_loss") is None:
        return []
    # The keys are strings where the report was read from its JSON file.
    others = [(float(bits), loss, False) for bits, loss in report["predicted_losses"].items()]
    return sorted([*others, (report["bits_per_weight"], report["predicted_loss"], True)])


def _dial_drawing(report: Report) -> dict[str, Any] | None:
    """Return the drawing of loss by size, for wide and for narrow windows; None without predictions for other sizes."""
    others = [(bits, loss) for bits, loss, chosen in _dial(report) if not chosen]
    if not others:
        return None
    size, predicted, measured = report["bits_per_weight"], report["predicted_loss"], report["measured_loss"]
    series = [
        Series("other sizes, predicted", 0, others),
        Series("this conversion, predicted", 1, [(size, predicted)], note=f"{predicted:.3g} predicted"),
    ]
    if measured is not None:
        series.append(
            Series("this conversion, measured", 2, [(size, measured)], note=f"{measured:.3g} measured")
        )
    colours = {line.label: line.colour for line in series}
    if measured is not None:
        link = [(size, predicted), (size, measured)]
        series.append(Series("from predicted to measured", 2, link, faint=True, dots=False))
    losses = [loss for line in series for _, loss in line.points]
    log = min(losses) > 0 and max(losses) > LOG_FROM * min(losses)
    charts = {
        name: line_chart(series, "bits per weight", "loss", log=log, width=width)
        for name, width in DIAL_WIDTHS.items()
    }
    return {"colours": colours, "charts": charts}


def _planes_chart(report: Report, colours: Mapping[str, int]) -> Markup | None:
    """Draw the planes of each kind of linear over the decoder layers; None if all have the same number."""
    if len(report["planes"]) == 1:
        return None
    planes = report["planes_of_linears"]
    series = [
        Series(kind, colours[kind], [(layer_of(name), planes[name]) for name in names])
        for kind, names in by_kind(planes).items()
    ]
    return line_chart(series, "layer", "planes")


def _error_chart(report: Report, colours: Mapping[str, int]) -> Markup:
    errors = {linear["name"]: linear["error"] for linear in report["linears"]}
    series = [
        Series(kind, colours[kind], [(layer_of(name), errors[name]) for name in names])
        for kind, names in by_kind(errors).items()
    ]
    return line_chart(series, "layer", "relative error")


def _objectives(report: Report) -> list[dict[str, Any]]:
    """Return what the section on rotations shows of each objective that they were learned with."""
    found = []
    for objective, (axis, description) in OBJECTIVES.items():
        traces = {
            name: trace[objective]
            for name, trace in report["traces"].items()
            if len(trace.get(objective, [])) > 1
        }
        colours = kind_colours(report, traces)
        series = [
            Series(name, colours[kind], list(enumerate(traces[name])), dots=False)
            for kind, names in by_kind(traces).items()
            for name in names
        ]
        if series:
            legend = {f"inputs of {kind}": colour for kind, colour in colours.items()}
            chart = line_chart(series, "round", axis)
            found.append({"description": description, "colours": legend, "chart": chart})
    return found


def _weights(report: Report) -> dict[str, Any] | None:
    """Return what the section on weights shows; None without statistics."""
    changes = report["statistics"].get("weights", {})
    if not changes:
        return None
    colours = kind_colours(report, changes)
    return {
        "colours": colours,
        "panels": _panels(changes, weight_panel),
        "bimodality_chart": _change_chart(changes, colours, "bimodality", "bimodality"),
        "error_chart": _change_chart(changes, colours, "binarization_error", "binarization error"),
    }


def _activations(report: Report) -> dict[str, Any] | None:
    """Return what the section on activations shows; None without statistics."""
    changes = report["statistics"].get("activations", {})
    if not changes:
        return None
    colours = kind_colours(report, changes)
    return {
        "colours": colours,
        "panels": _panels(changes, activation_panel),
        "peak_chart": _change_chart(changes, colours, "peak", "max / rms", log=True),
    }


def _panels(
    changes: Mapping[str, Any], panel: Callable[[str, Sequence[Mapping[str, Any]]], Panel]
) -> list[Panel]:
    """Return a panel for each kind of linear, titled with the kind and the number of its linears."""
    return [
        panel(f"{kind} ({len(names)})", [changes[name] for name in names])
        for kind, names in by_kind(changes).items()
    ]


def _change_chart(
    changes: Mapping[str, Any], colours: Mapping[str, int], figure: str, label: str, log: bool = False
) -> Markup:
    """Draw one figure over the decoder layers, dashed before and solid after."""
    series = [
        Series(
            f"{kind} {side}",
            colours[kind],
            [(layer_of(name), changes[name][side][figure]) for name in names],
            faint=side == "before",
            dots=side == "after",
        )
        for side in ("before", "after")
        for kind, names in by_kind(changes).items()
    ]
    positive = all(y > 0 for line in series for _, y in line.points)
    return line_chart(series, "layer", label, log=log and positive)


def _origin(report: Report) -> dict[str, Any]:
    provenance = report["provenance"]
    calibration = ", ".join(f"{key} {value}" for key, value in provenance["calibration"].items())
    return {
        "base model": provenance["base_model"],
        "revision": provenance["revision"],
        "recipe": provenance["recipe"],
        "seed": provenance["seed"],
        "calibration": calibration or "none",
        "time": duration(report["seconds"]),
        "peak memory": decimal(report["memory"]["cpu"]),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
