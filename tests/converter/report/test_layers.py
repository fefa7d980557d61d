"""Panels: outlines of histograms, means over linears, and which panels a decoder layer has."""

import re

import pytest
from bwla_converter.report.layers import activation_panel, by_kind, decoder_layers, layer_of, weight_panel


def distribution(histogram: list[float], figure: float = 1.0) -> dict:
    figures = ("kurtosis", "bimodality", "binarization_error", "peak", "peak_p99", "outside")
    return {**dict.fromkeys(figures, figure), "span": 4.0, "histogram": histogram}


def heights(outline: str) -> list[float]:
    return [float(y) for y in re.findall(r"V([\d.]+)H", outline)]


def test_a_histogram_reaches_the_top_at_the_highest_bin_of_both() -> None:
    change = {"before": distribution([0.25] * 4), "after": distribution([0.1, 0.4, 0.4, 0.1])}
    panel = weight_panel("q_proj", [change])
    assert heights(panel.after) == [102, 24, 24, 102]
    assert heights(panel.before) == [63] * 4
    assert panel.before.endswith("H224")
    assert [tick["label"] for tick in panel.ticks] == ["-4", "-2", "0", "2", "4"]


def test_a_logarithmic_histogram_shows_small_shares() -> None:
    change = {side: distribution([0.999, 0.001, 0.0]) for side in ("before", "after")}
    assert heights(weight_panel("x", [change]).after)[1] > 127
    assert heights(activation_panel("x", [change]).after)[1] < 100
    assert heights(activation_panel("x", [change]).after)[2] == 128


def test_a_panel_shows_the_mean_of_its_linears() -> None:
    low, high = (
        {side: distribution(bins, figure) for side in ("before", "after")}
        for figure, bins in ((1.0, [0.0, 1.0]), (3.0, [1.0, 0.0]))
    )
    panel = weight_panel("x", [low, high])
    assert panel.change["after"]["kurtosis"] == pytest.approx(2.0)
    assert panel.change["before"]["histogram"] == [0.5, 0.5]


def test_linears_are_grouped_by_kind_and_sorted_by_layer() -> None:
    names = [
        "model.layers.10.mlp.up_proj",
        "model.layers.9.mlp.up_proj",
        "model.layers.9.mlp.down_proj",
        "head",
    ]
    assert by_kind(names) == {"up_proj": [names[1], names[0]], "down_proj": [names[2]], "head": ["head"]}
    assert [layer_of(name) for name in names] == [10, 9, 9, 0]


def test_a_decoder_layer_has_the_panels_that_there_are_statistics_for() -> None:
    names = ["model.layers.1.a.q_proj", "model.layers.0.a.q_proj", "model.layers.0.a.k_proj"]
    change = {side: distribution([0.5, 0.5]) for side in ("before", "after")}
    report = {
        "linears": [
            {"name": name, "error": error} for name, error in zip(names, (0.1, 0.2, 0.4), strict=True)
        ],
        "statistics": {"weights": {names[1]: change}, "activations": {names[1]: change}},
    }
    first, second = decoder_layers(report)
    assert [panel.title for panel in first.panels] == ["input of q_proj", "q_proj"]
    assert first.mean_error == pytest.approx(0.3)
    assert [linear["change"] for linear in first.linears] == [change, None]
    assert (second.index, second.panels) == (1, [])
