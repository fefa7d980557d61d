"""Charts as inline SVG: lines over an axis, two histograms in one panel, a stacked bar. Colours come from the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: told on hovering over a point.
        colour: number of the page's colour, see `legend`.
        points: (x, y).
        faint: drawn thin and dashed: what things were like before.
        dots: whether the points are marked.
    """

    label: str
    colour: int
    points: Sequence[tuple[float, float]]
    faint: bool = False
    dots: bool = True


def nice_ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around `low` > 0 and `high`; powers of ten alone over three decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 3 else (1, 2, 5)
    every = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    below = max((tick for tick in every if tick <= low * 1.0001), default=every[0])
    above = min((tick for tick in every if tick >= high * 0.9999), default=every[-1])
    return [tick for tick in every if below <= tick <= above]


def number(value: float) -> str:
    """A tick's label."""
    if value and (abs(value) >= 10000 or abs(value) < 0.001):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}"


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    size: tuple[int, int] = (980, 300),
    whole_x: bool = True,
) -> str:
    """Lines with axes, grid and a tooltip at every point.

    Args:
        series: at least one with points.
        x_label, y_label: what the axes are.
        log: a logarithmic y axis; values must be positive.
        size: of the drawing; the page scales it.
        whole_x: ticks on the x axis at whole numbers only.
    """
    width, height = size
    left, right, top, bottom = 62, width - 14, 12, height - 42
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_ticks = log_ticks(min(ys), max(ys)) if log else nice_ticks(min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1] if y_ticks[-1] > y_ticks[0] else y_ticks[0] * 2

    def at(x: float, y: float) -> tuple[float, float]:
        share = math.log(y / y_low) / math.log(y_high / y_low) if log else (y - y_low) / (y_high - y_low)
        return left + 8 + (x - x_low) / (x_high - x_low) * (right - left - 16), bottom - share * (
            bottom - top
        )

    parts = []
    for tick in y_ticks:
        y = at(x_low, tick)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text class="tick end" x="{left - 6}" y="{y + 4:.1f}">{number(tick)}</text>')
    x_ticks = [tick for tick in nice_ticks(x_low, x_high, 12) if x_low <= tick <= x_high]
    for tick in (tick for tick in x_ticks if not whole_x or tick == int(tick)):
        x = at(tick, y_low)[0]
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{bottom + 17}">{number(tick)}</text>')
    for one in series:
        places = [at(x, y) for x, y in one.points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        faint = " faint" if one.faint else ""
        parts.append(
            f'<path class="line k{one.colour}{faint}" d="M{line}"><title>{escape(one.label)}</title></path>'
        )
        if one.dots:
            parts += (
                f'<circle class="dot k{one.colour}{faint}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(one.label)}, {escape(x_label)} {number(here[0])}: {here[1]:.4g}</title></circle>"
                for (x, y), here in zip(places, one.points, strict=True)
            )
    parts.append(
        f'<text class="axis mid" x="{(left + right) / 2:.0f}" y="{height - 6}">{escape(x_label)}</text>'
    )
    middle = (top + bottom) / 2
    parts.append(
        f'<text class="axis mid" transform="translate(14 {middle:.0f}) rotate(-90)">{escape(y_label)}</text>'
    )
    return _svg(width, height, parts)


def histogram_panel(
    before: Sequence[float], after: Sequence[float], span: float, title: str, *, log: bool = False
) -> str:
    """Two histograms over [-span, span], the first filled, the second as a line.

    Args:
        before, after: shares per bin, the same bins.
        span: reach of the bins, in root mean squares.
        title: above the panel.
        log: a logarithmic y axis, for tails.
    """
    width, height, left, right, top, bottom = 230, 150, 6, 224, 24, 128
    floor = 1e-6
    highest = max([*before, *after, floor])

    def level(value: float) -> float:
        share = (
            math.log10(max(value, floor) / floor) / math.log10(highest / floor) if log else value / highest
        )
        return round(bottom - share * (bottom - top), 1)

    def steps(values: Sequence[float]) -> str:
        bin_width = (right - left) / len(values)
        return "".join(
            f"L{left + index * bin_width:.0f} {y:g}L{left + (index + 1) * bin_width:.0f} {y:g}"
            for index, y in enumerate(map(level, values))
        )

    parts = [f'<text class="title" x="{left}" y="15">{escape(title)}</text>']
    for tick in (-span, -span / 2, 0, span / 2, span):
        x = left + (tick + span) / (2 * span) * (right - left)
        anchor = "start" if tick == -span else "end" if tick == span else "mid"
        parts.append(f'<path class="grid" d="M{x:.0f} {top}V{bottom}"/>')
        parts.append(f'<text class="tick {anchor}" x="{x:.0f}" y="{bottom + 15}">{number(tick)}</text>')
    parts.append(f'<path class="before" d="M{left} {bottom}{steps(before)}L{right} {bottom}Z"/>')
    parts.append(f'<path class="after" d="M{left} {bottom}{steps(after)}L{right} {bottom}"/>')
    parts.append(f'<path class="base" d="M{left} {bottom}H{right}"/>')
    return _svg(width, height, parts)


def stacked_bar(parts: Mapping[str, float], total: float, colours: Mapping[str, int]) -> str:
    """A bar whose whole width stands for `total`; parts of nothing are left out."""
    shown = {name: value for name, value in parts.items() if value > 0}
    cells = "".join(
        f'<i class="b{colours[name]}" style="width:{100 * value / total:.3f}%" title="{escape(name)}"></i>'
        for name, value in shown.items()
    )
    return f'<div class="bar">{cells}</div>'


def legend(labels: Mapping[str, int]) -> str:
    """Names of colours; the page defines as many as `COLOURS`."""
    items = "".join(
        f'<span><i class="b{colour}"></i>{escape(label)}</span>' for label, colour in labels.items()
    )
    return f'<p class="legend">{items}</p>'


COLOURS = 8
"""Colours that the page defines, `k0`... for lines and `b0`... for areas."""


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
