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


def test_axes_of_whole_numbers_have_no_ticks_between_them() -> None:
    assert labels_of(line_chart([Series("a", 0, [(0, 1), (1, 3)])], "x", "y"), "end") == ["1", "2", "3"]
    fractions = labels_of(line_chart([Series("a", 0, [(1.16, 1.5), (2.2, 2.0)])], "x", "y"), "middle")
    assert {"1.2", "1.6", "2.0"} <= set(fractions)


def test_a_drawing_is_as_wide_as_it_is_to_be_and_has_fewer_ticks_if_narrow() -> None:
    series = [Series("a", 0, [(0, 1.0), (40, 2.0)])]
    narrow, usual = line_chart(series, "x", "y", width=340), line_chart(series, "x", "y")
    assert ElementTree.fromstring(narrow).get("viewBox").split()[2] == "340"
    assert len(labels_of(narrow, "middle")) < len(labels_of(usual, "middle"))
    assert max(x for x, _ in dots_of(narrow)) < 340


def notes_of(chart: str) -> dict[str | None, tuple[str, float, float]]:
    """Each note's text -> on which side of its point it stands, x and y."""
    return {
        text.text: (text.get("class").split()[1], float(text.get("x")), float(text.get("y")))
        for text in ElementTree.fromstring(chart).iter("text")
        if text.get("class").startswith("note ")
    }


@pytest.mark.parametrize("width", [340, 980])
@pytest.mark.parametrize(("place", "anchor"), [(1.0, "start"), (2.99, "end")])
def test_notes_stand_inside_beside_their_points_and_apart(width: int, place: float, anchor: str) -> None:
    curve = Series("curve", 0, [(1.0, 1.0), (3.0, 0.1)])
    marks = [
        Series("low", 1, [(place, 0.5)], note="0.5 low"),
        Series("high", 2, [(place, 0.51)], note="high"),
    ]
    chart = line_chart([curve, *marks], "x", "y", width=width)
    notes = notes_of(chart)
    assert {side for side, _, _ in notes.values()} == {anchor}
    assert all(0 < x < width for _, x, _ in notes.values())
    assert notes["0.5 low"][2] - notes["high"][2] >= 12, "the higher point's note is above the other"
    sizes = [dot.get("r") for dot in ElementTree.fromstring(chart).iter("circle")]
    assert sizes == ["3", "3", "5", "5"]


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
