"""Line charts, drawn by matplotlib and rewritten to small inline SVG that takes its colours from the page.

Only artists with a `gid` are kept: matplotlib writes it as the id of a group, and it becomes the element's CSS class.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

COLOURS = 8
"""Number of colours that the page defines: classes `k0`... for lines, `b0`... for areas."""

WIDTH, HEIGHT = 980, 300
NOTE_GAP, NOTE_HEIGHT, NOTE_CHARACTER = 9, 17, 8
"""Pixels between a point and its note, from one note to the next, and of a note's average character at most."""

SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "bwla", "axes.unicode_minus": False}
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: shown as a tooltip.
        colour: index of a colour of the page, see `COLOURS`.
        points: (x, y).
        faint: draw the line thin and dashed; used for values before the conversion.
        dots: mark the points.
        note: text beside the last point, which is marked larger; "" for none.
    """

    label: str
    colour: int
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = True
    note: str = ""


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, log: bool = False, width: int = WIDTH
) -> Markup:
    """Draw lines over a grid, with a tooltip for each line and each marked point, as an SVG element.

    Args:
        series: the lines; together they have at least one point.
        x_label, y_label: titles of the axes. An axis whose values are whole numbers has no ticks between them.
        log: use a logarithmic y axis; all y values must be positive.
        width: width of the drawing in pixels; its text has the same size at every width.
    """
    with rc_context(SETTINGS):
        figure = Figure((width / 72, HEIGHT / 72), dpi=72)  # 1 unit of the SVG is 1 pixel
        axes = figure.add_axes((62 / width, 42 / HEIGHT, (width - 76) / width, (HEIGHT - 54) / HEIGHT))
        for index, line in enumerate(series):
            x, y = zip(*line.points, strict=True)
            marker = "o" if line.dots else ""
            axes.plot(x, y, marker=marker, gid=f"line-{index}", clip_on=False)
        if log:
            axes.set_yscale("log")
        _set_ticks(axes, series, log, width)
        _format_axes(axes, x_label, y_label)
        _write_notes(axes, series)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    root = _rewrite(file.getvalue(), series, x_label, width)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _format_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """Set labels and grid, and give a `gid` to all that `_rewrite` keeps; the ticks must be chosen before."""
    axes.set_xlabel(x_label, gid="axis", fontsize=12)
    axes.set_ylabel(y_label, gid="axis", fontsize=12)
    axes.grid(axis="y", gid="grid", clip_on=False)
    for label in chain(axes.get_xticklabels(), axes.get_yticklabels()):
        label.set(gid="tick", fontsize=11)


def _set_ticks(axes: Axes, series: Sequence[Series], log: bool, width: int) -> None:
    """Choose the margins and the ticks of both axes."""
    axes.margins(x=0.01, y=0.06)
    xs, ys = zip(*(point for line in series for point in line.points), strict=True)
    axes.xaxis.set_major_locator(MaxNLocator(max(2, width // 80), integer=_whole(xs), min_n_ticks=1))
    if not log:
        if _whole(ys):
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _whole(values: Sequence[float]) -> bool:
    return all(float(value).is_integer() for value in values)


def _write_notes(axes: Axes, series: Sequence[Series]) -> None:
    """Write the notes so that they cover neither each other nor a line that falls from left to right.

    Above and to the right of its point there is no line; where the room ends, the lowest note goes below and to the
    left instead, and the others above.
    """
    places = [(axes.transData.transform(line.points[-1]), line) for line in series if line.note]
    right_end = axes.get_window_extent().x1
    lowest_free = 0.0
    for index, ((x, y), line) in enumerate(sorted(places, key=lambda place: float(place[0][1]))):
        left = x + NOTE_GAP + NOTE_CHARACTER * len(line.note) > right_end
        below = left and index == 0
        up = -NOTE_GAP / 2 if below else max(NOTE_GAP / 2, lowest_free - y)
        lowest_free = y + up + (0 if below else NOTE_HEIGHT)
        axes.annotate(
            line.note,
            line.points[-1],
            xytext=(-NOTE_GAP if left else NOTE_GAP, up),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            verticalalignment="top" if below else "bottom",
            fontsize=12,
            gid="note",
        )


def _rewrite(svg: bytes, series: Sequence[Series], x_label: str, width: int) -> ElementTree.Element:
    """Reduce matplotlib's SVG to paths, circles and texts that are styled by the page's CSS classes."""
    root = ElementTree.Element("svg", viewBox=f"0 0 {width} {HEIGHT}", role="img")
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        name = group.get("id", "")
        if name == "grid":
            root.extend(
                _element("path", "grid", d=_short(path.get("d"))) for path in group.iter(f"{SVG}path")
            )
        elif name in ("tick", "axis", "note"):
            root.extend(_text(text, name) for text in group.iter(f"{SVG}text"))
        elif name.startswith("line-"):
            root.extend(_line(group, series[int(name.removeprefix("line-"))], x_label))
    return root


def _line(group: ElementTree.Element, series: Series, x_label: str) -> Iterator[ElementTree.Element]:
    classes = f"k{series.colour}{' faint' if series.faint else ''}"
    path = group.find(f"{SVG}path")
    if path is not None:
        yield _element("path", f"line {classes}", series.label, d=_short(path.get("d")))
    for dot, (x, y) in zip(
        group.iter(f"{SVG}use"), series.points, strict=False
    ):  # no dots unless `series.dots`
        tooltip = f"{series.label}, {x_label} {x:g}: {y:.4g}"
        yield _element(
            "circle",
            f"dot {classes}",
            tooltip,
            cx=_short(dot.get("x")),
            cy=_short(dot.get("y")),
            r="5" if series.note else "3",
        )


def _text(text: ElementTree.Element, name: str) -> ElementTree.Element:
    """Keep place, rotation and alignment; the font comes from the page."""
    style, rotation = text.get("style", ""), text.get("transform", "")
    anchor = next((word for word in ("middle", "end") if f"text-anchor: {word}" in style), "start")
    place = {"x": _short(text.get("x")), "y": _short(text.get("y"))}
    if not rotation.startswith("rotate(-0 "):
        place["transform"] = _short(rotation)
    element = _element("text", f"{name} {anchor}", **place)
    element.text = text.text
    return element


def _element(tag: str, classes: str, tooltip: str = "", **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(tag, {"class": classes, **attributes})
    if tooltip:
        ElementTree.SubElement(element, "title").text = tooltip
    return element


def _short(value: str | None) -> str:
    """Round the numbers of an attribute to one decimal and drop needless space."""
    rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), value or "")
    return re.sub(r"\s*([MLHVZ])\s*", r"\1", rounded.strip())
