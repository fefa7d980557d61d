"""Charts are well-formed SVG whose points lie where the values are."""

import re
from xml.etree import ElementTree

import pytest
from bwla_converter.report.charts import (
    Series,
    histogram_panel,
    legend,
    line_chart,
    log_ticks,
    nice_ticks,
    number,
    stacked_bar,
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.66, 0.73, [0.66, 0.68, 0.7, 0.72, 0.74]),
        (-3.0, 12.0, [-5.0, 0.0, 5.0, 10.0, 15.0]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e9])
def test_ticks_of_a_single_value(value: float) -> None:
    ticks = nice_ticks(value, value)
    assert ticks[0] <= value < ticks[-1]


def test_logarithmic_ticks() -> None:
    assert log_ticks(3.0, 9.0) == pytest.approx([2, 5, 10])
    assert log_ticks(1e-4, 50.0) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100])
    assert len(log_ticks(5.0, 5.0)) >= 1


def test_labels_of_numbers() -> None:
    assert [number(value) for value in (0.0, 0.66, 1.25, 2000.0, 20000.0, 0.0001)] == [
        "0", "0.66", "1.25", "2,000", "2e4", "1e-4"
    ]  # fmt: skip


@pytest.mark.parametrize("log", [False, True])
def test_larger_values_are_higher_and_later_ones_further_right(log: bool) -> None:
    chart = line_chart([Series("a <b>", 2, [(0, 1.0), (1, 2.0), (2, 8.0)])], "block", "error", log=log)
    root = ElementTree.fromstring(chart)
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle")]
    assert len(dots) == 3
    assert dots == sorted(dots)
    assert [y for _, y in dots] == sorted((y for _, y in dots), reverse=True)
    width, height = map(float, root.get("viewBox").split()[2:])
    assert all(0 < x < width and 0 < y < height for x, y in dots)
    assert "a &lt;b&gt;" in chart


def test_lines_without_dots_and_of_one_point() -> None:
    chart = line_chart([Series("x", 0, [(5, 3.0)], dots=False)], "x", "y")
    ElementTree.fromstring(chart)
    assert "circle" not in chart


def test_a_histogram_reaches_the_top_at_its_highest_bin() -> None:
    panel = histogram_panel([0.25] * 4, [0.1, 0.4, 0.4, 0.1], 4.0, "q & k")
    ElementTree.fromstring(panel)
    levels = [
        float(y) for _, y in re.findall(r"L(\d+) ([\d.]+)", panel.split('class="after"')[1].split('"')[1])
    ]
    assert min(levels) == 24
    assert levels.count(24.0) == 4


def test_a_logarithmic_histogram_shows_small_shares() -> None:
    flat = histogram_panel([0.999, 0.001], [0.999, 0.001], 8.0, "x")
    steep = histogram_panel([0.999, 0.001], [0.999, 0.001], 8.0, "x", log=True)
    assert flat != steep
    ElementTree.fromstring(steep)


def test_bars_and_legends() -> None:
    bar = stacked_bar(
        {"signs": 1.0, "nothing": 0.0, "scales": 0.5}, 2.0, {"signs": 0, "nothing": 1, "scales": 2}
    )
    assert re.findall(r"width:([\d.]+)%", bar) == ["50.000", "25.000"]
    assert "nothing" not in bar
    assert "a&lt;b" in legend({"a<b": 3})
