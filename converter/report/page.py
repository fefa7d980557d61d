"""The report as one HTML page: no scripts, no network, light and dark; see `report.build_report` for the data."""

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from bwla_converter.checkpoint.contents import kind_of
from bwla_converter.report.charts import COLOURS, Series, legend, line_chart, stacked_bar
from bwla_converter.report.layers import (
    activation_panels,
    block_of,
    layer_details,
    layer_groups,
    weight_panels,
)

Report = Mapping[str, Any]


def render_page(report: Report) -> str:
    """The whole page."""
    template = Template(files("bwla_converter.report").joinpath("template.html").read_text(encoding="utf-8"))
    base = report["provenance"]["base_model"] or "a model"
    sections = (
        _head(report, base),
        _section("Bits and bytes", _ledger(report)),
        _section("Error of each layer", _errors(report)),
        _section("Rotation objective (OKT)", _objective(report)),
        _section("Weights before and after", _weights(report)),
        _section("Activations before and after", _activations(report)),
        _section("What they write", _samples(report)),
        _section("How it was made", _origin(report)),
        _section("Every layer", layer_details(report)),
    )
    return template.substitute(title=escape(f"BWLA report: {base}"), body="\n".join(filter(None, sections)))


def colours_of(names: Iterable[str]) -> dict[str, int]:
    """A colour for each name, in order of appearance."""
    return {name: index % COLOURS for index, name in enumerate(dict.fromkeys(names))}


def kind_colours(report: Report, kinds: Iterable[str]) -> dict[str, int]:
    """The colours of these kinds of layers: one kind, one colour, on the whole page."""
    every = colours_of(kind_of(layer["name"]) for layer in report["layers"])
    return {kind: every[kind] for kind in kinds}


def size(count: float) -> str:
    """Bytes in words: 1.23 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return (
                f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:,.0f} {unit}"
            )
    return f"{count:,.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds in words: 1 h 02 min."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def _head(report: Report, base: str) -> str:
    layers = report["layers"]
    errors = [layer["error"] for layer in layers]
    bits = report["activation_bits"]
    tiles = [
        (f"{report['bits_per_weight']:.3f}", "bits per quantized weight, all-in"),
        (f"{report['bytes_before'] / report['bytes_after']:.2f}x", "smaller, the whole model"),
        ("as they are" if bits == 16 else f"{bits} bits", "activations"),
        (f"{report['head_bits']} bits", "language-model head"),
        (f"{sum(errors) / len(errors):.3f}", f"mean relative error of {len(layers)} layers"),
        (duration(report["seconds"]), "conversion"),
        (size(report["memory"]["cpu"]), "peak memory of the process"),
    ]
    if "gpu" in report["memory"]:
        tiles.append((size(report["memory"]["gpu"]), "peak memory on a GPU"))
    cells = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    warning = report.get("calibration_warning")
    note = f'<p class="warning">{escape(warning)}</p>' if warning else ""
    return (
        f"<h1>{escape(base)} in one bit</h1>\n"
        f'<p class="soft">{escape(report["architecture"])}, {report["weights"]:,} quantized weights, recipe '
        f"{escape(report['provenance']['recipe'])}, rank {report['rank']}, seed {report['provenance']['seed']}</p>\n"
        f'{note}<div class="tiles">{cells}</div>'
    )


def _ledger(report: Report) -> str:
    bits, sizes = report["bits"], report["bytes"]
    kinds = colours_of(sizes["before"])
    colours = colours_of(bits)
    total = max(sum(part.values()) for part in sizes.values())
    rows = "".join(
        f'<tr><td><i class="b{colours[name]}"></i>{escape(name)}</td><td>{value:.4f}</td>'
        f"<td>{100 * value / report['bits_per_weight']:.1f} %</td></tr>"
        for name, value in bits.items()
    )
    byte_rows = "".join(
        f'<tr><td><i class="b{kinds[name]}"></i>{escape(name)}</td><td>{sizes["before"][name]:,}</td>'
        f"<td>{sizes['after'][name]:,}</td></tr>"
        for name in kinds
    )
    bars = "".join(
        f'<span class="soft">{side}</span>{stacked_bar(sizes[side], total, kinds)}'
        for side in ("before", "after")
    )
    sums = "".join(f"<td>{sum(sizes[side].values()):,}</td>" for side in ("before", "after"))
    return (
        f"<h3>Bits per quantized weight: {report['bits_per_weight']:.4f}</h3>"
        f"{stacked_bar(bits, sum(bits.values()), colours)}"
        f"<table><tr><th>what for</th><th>bits per weight</th><th>share</th></tr>{rows}</table>"
        f'<h3>Bytes of the whole model</h3><div class="bars">{bars}</div>'
        f"<table><tr><th>what</th><th>before</th><th>after</th></tr>{byte_rows}"
        f"<tr><td>all tensors</td>{sums}</tr></table>"
    )


def _errors(report: Report) -> str:
    of = "outputs" if report["provenance"]["recipe"] != "paper" else "weight"
    worst = sorted(report["layers"], key=lambda layer: -layer["error"])[:5]
    listed = ", ".join(f"{escape(layer['name'])} ({layer['error']:.3f})" for layer in worst)
    groups = layer_groups(layer["name"] for layer in report["layers"])
    colours = kind_colours(report, groups)
    table = {layer["name"]: layer["error"] for layer in report["layers"]}
    series = [
        Series(kind, colours[kind], [(block_of(name), table[name]) for name in names])
        for kind, names in groups.items()
    ]
    return (
        f"<p>Relative error of each layer's {of}: the root of the share of its power that is lost. "
        f"Largest: {listed}.</p>"
        f"{legend(colours)}{line_chart(series, 'block', 'relative error')}"
    )


def _objective(report: Report) -> str:
    traces = {name: trace["okt"] for name, trace in report["traces"].items() if len(trace.get("okt", [])) > 1}
    if not traces:
        return ""
    groups = layer_groups(traces)
    colours = kind_colours(report, groups)
    series = [
        Series(name, colours[kind], list(enumerate(traces[name])), dots=False)
        for kind, names in groups.items()
        for name in names
    ]
    labels = {f"group of {kind}": colour for kind, colour in colours.items()}
    return (
        "<p>Negative log likelihood of the rotated rows under two mirrored Gaussians, after each round; one line for "
        "each group of layers that share an input. It never grows.</p>"
        f'{legend(labels)}<div class="thin">{line_chart(series, "round", "nats per weight")}</div>'
    )


BEFORE_AFTER = (
    '<p class="legend"><span><i class="swatch-before"></i>before</span>'
    '<span><i class="swatch-after"></i>after the rotation{}</span></p>'
)


def _weights(report: Report) -> str:
    changes = report["statistics"].get("weights", {})
    if not changes:
        return ""
    groups = layer_groups(changes)
    colours = kind_colours(report, groups)
    charts = (
        "<h3>Bimodality coefficient: 1/3 for a Gaussian, 1 for two values</h3>"
        f"{_change_chart(changes, colours, 'bimodality', 'bimodality')}"
        "<h3>Share of a row's power that signs alone lose: 0.363 for a Gaussian</h3>"
        f"{_change_chart(changes, colours, 'binarization_error', 'share lost')}"
    )
    return (
        "<p>Values in units of their row's root mean square, mean over the layers of a kind. One bit keeps two values "
        "for each row: the more a row looks like two peaks, the less is lost.</p>"
        f"{BEFORE_AFTER.format(' and column scale')}{weight_panels(changes, groups)}{charts}"
    )


def _activations(report: Report) -> str:
    changes = report["statistics"].get("activations", {})
    if not changes:
        if report["provenance"]["recipe"] == "paper":
            return "<p class=soft>Recipe paper looks at no text, so there are no activations to show.</p>"
        return ""
    groups = layer_groups(changes)
    return (
        "<p>Inputs of each group of layers, in units of their token's root mean square, on a logarithmic scale. Codes "
        "must reach the largest value of a token, so tails cost precision; the rotation spreads them.</p>"
        f"{BEFORE_AFTER.format(' and column scale')}{activation_panels(changes, groups)}"
        "<h3>Largest value of a token over its root mean square, mean over tokens</h3>"
        f"{_change_chart(changes, kind_colours(report, groups), 'peak', 'max / rms', True)}"
    )


def _change_chart(
    changes: Mapping[str, Any], colours: Mapping[str, int], figure: str, label: str, log: bool = False
) -> str:
    """One figure over the blocks: dashed before, whole after."""
    groups = layer_groups(changes)
    series = [
        Series(
            f"{kind} {side}",
            colours[kind],
            [(block_of(name), changes[name][side][figure]) for name in names],
            faint=side == "before",
            dots=side == "after",
        )
        for side in ("before", "after")
        for kind, names in groups.items()
    ]
    if log and min(y for one in series for _, y in one.points) <= 0:
        log = False
    dashed = '<p class="soft"><small>dashed: before</small></p>'
    return f"{legend(colours)}{line_chart(series, 'block', label, log=log)}{dashed}"


def _samples(report: Report) -> str:
    if not report.get("samples"):
        reason = report.get("no_samples")
        return f"<p class=soft>No samples: {escape(reason)}.</p>" if reason else ""
    rows = "".join(
        f"<tr><td>{escape(sample['prompt'])}</td><td>{escape(sample['original'])}</td><td>{escape(sample['bwla'])}</td></tr>"
        for sample in report["samples"]
    )
    return (
        "<p>Greedy continuations; an impression, not a measurement.</p>"
        '<div class="scroll"><table class="texts"><tr><th>prompt</th><th>original</th><th>BWLA</th></tr>'
        f"{rows}</table></div>"
    )


def _origin(report: Report) -> str:
    calibration = report["provenance"]["calibration"]
    rows = {
        "base model": report["provenance"]["base_model"],
        "revision": report["provenance"]["revision"],
        "recipe": report["provenance"]["recipe"],
        "seed": report["provenance"]["seed"],
        "calibration": ", ".join(f"{key} {value}" for key, value in calibration.items()) or "none",
        "time": duration(report["seconds"]),
        "peak memory": size(report["memory"]["cpu"]),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    lines = "".join(
        f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>"
        for key, value in rows.items()
        if value not in ("", None)
    )
    return f'<div class="scroll"><table class="texts">{lines}</table></div>'
