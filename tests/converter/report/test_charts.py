"""Line charts are small, well-formed SVG whose points lie where the values are, without colours of their own."""

from xml.etree import ElementTree

import pytest
from bwla_converter.report.charts import Series, line_chart


def dots_of(chart: str) -> list[tuple[float, float]]:
    return [
        (float(dot.get("cx")), float(dot.get("cy"))) for dot in ElementTree.fromstring(chart).iter("circle")
    ]


def labels_of(chart: str, anchor: str) -> list[str | None]:
    texts = ElementTree.fromstring(chart).iter("text")
    return [text.text for text in texts if text.get("class") == f"tick {anchor}"]


@pytest.mark.parametrize("log", [False, True])
def test_larger_values_are_higher_and_later_ones_further_right(log: bool) -> None:
    chart = line_chart([Series("a <b>", 2, [(0, 1.0), (1, 2.0), (2, 8.0)])], "layer", "error", log=log)
    dots = dots_of(chart)
    assert len(dots) == 3
    assert dots == sorted(dots)
    assert [y for _, y in dots] == sorted((y for _, y in dots), reverse=True)
    width, height = map(float, ElementTree.fromstring(chart).get("viewBox").split()[2:])
    assert all(0 < x < width and 0 < y < height for x, y in dots)
    assert "<title>a &lt;b&gt;, layer 2: 8</title>" in chart


def test_a_logarithmic_axis_has_equal_steps_for_equal_ratios() -> None:
    chart = line_chart([Series("a", 0, [(0, 1.0), (1, 10.0), (2, 100.0)])], "x", "y", log=True)
    first, second, third = (y for _, y in dots_of(chart))
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert labels_of(chart, "end") == ["1", "2", "5", "10", "20", "50", "100"]


def test_ticks_of_x_are_integers() -> None:
    assert labels_of(line_chart([Series("a", 0, [(0, 1.0), (3, 2.0)])], "x", "y"), "middle") == list("0123")
    assert labels_of(line_chart([Series("a", 0, [(5, 3.0)])], "x", "y"), "middle") == ["5"]


def test_colours_come_from_the_page_and_nothing_refers_elsewhere() -> None:
    series = [Series("a", 0, [(0, 1.0), (1, 2.0)], faint=True, dots=False), Series("b", 7, [(0, 1.5)])]
    chart = line_chart(series, "layer", "q & k")
    assert 'class="line k0 faint"' in chart
    assert 'class="dot k7"' in chart
    assert len(dots_of(chart)) == 1
    assert "q &amp; k" in chart
    for word in ("style=", "stroke", "fill", "href", "url(", "id=", "http", "font"):
        assert word not in chart


def test_the_same_data_give_the_same_bytes() -> None:
    series = [Series("a", 0, [(0, 1.0), (1, 2.0)])]
    assert line_chart(series, "x", "y") == line_chart(series, "x", "y")
