"""Conversions of the example model, and their perplexity."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bwla_converter.evaluation.perplexity import compare, windows_of
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_kernels.errors import BWLAError
from paths import ROOT

EXAMPLE = ROOT / "examples" / "model"
HELD_OUT = ROOT / "examples" / "text" / "heldout.txt"


def test_perplexity_of_the_converted_example_is_finite(example_bwla: Path) -> None:
    result = compare(EXAMPLE, example_bwla, HELD_OUT, window=512, limit=8)
    print(result)
    assert math.isfinite(result.bwla)
    # One-bit weights cost accuracy, but the model must stay far better than a uniform guess over the vocabulary.
    vocabulary = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    assert result.original < result.bwla < vocabulary / 4


def test_objectives_of_the_example_never_grow(example_bwla: Path) -> None:
    report = json.loads((example_bwla / "bwla_report.json").read_text())
    for name, traces in report["traces"].items():
        for kind, trace in traces.items():
            assert all(b <= a + 1e-6 * abs(a) for a, b in pairwise(trace)), (name, kind)


def test_an_incomplete_last_window_is_dropped() -> None:
    import torch

    assert windows_of(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.slow
def test_recipe_fast_keeps_far_more_than_data_free(example_bwla: Path, tmp_path: Path) -> None:
    calibration = Calibration(
        str(ROOT / "examples" / "text" / "calibration.txt"), num_samples=24, max_seq_length=128
    )
    out = tmp_path / "fast"
    convert(Options(str(EXAMPLE), out, recipe="fast", rank=1, head_bits=8, calibration=calibration))
    fast, data_free = (
        compare(EXAMPLE, folder, HELD_OUT, window=512, limit=4) for folder in (out, example_bwla)
    )
    print(fast, data_free)
    assert math.log(fast.ratio) < 0.6 * math.log(data_free.ratio)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["recipe"] == "fast"
    assert config["provenance"]["calibration"]["source"] == "calibration.txt"
    report = json.loads((out / "bwla_report.json").read_text())
    assert all(trace["output"][-1] < 1 for trace in report["traces"].values())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipe": "none"}, "does not exist"),
        (
            {"recipe": "data-free", "target_bits": 2.2},
            "found recipe data-free, which uses none: choose --recipe fast",
        ),
        ({"recipe": "paper", "planes": 2}, "use --recipe fast or best"),
    ],
)
def test_recipes_that_cannot_run(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BWLAError, match=sentence):
        convert(Options(str(EXAMPLE), tmp_path / "out", **options))
    assert list(tmp_path.iterdir()) == []
