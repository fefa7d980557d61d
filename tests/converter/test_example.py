"""The example model, really converted: its perplexity, from the function that the demo uses."""

import json
import math
from itertools import pairwise
from pathlib import Path

from bwla_converter.evaluate import compare, windows_of

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "model"
HELD_OUT = ROOT / "examples" / "text" / "heldout.txt"


def test_perplexity_of_the_converted_example_is_finite(example_bwla: Path) -> None:
    result = compare(EXAMPLE, example_bwla, HELD_OUT, window=512, limit=8)
    print(result)
    assert math.isfinite(result.bwla)
    # One-bit weights cost something, but far less than losing the model (a uniform guess is the vocabulary).
    vocabulary = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    assert result.original < result.bwla < vocabulary / 4


def test_objectives_of_the_example_never_grow(example_bwla: Path) -> None:
    report = json.loads((example_bwla / "bwla_report.json").read_text())
    for name, traces in report["traces"].items():
        for kind, trace in traces.items():
            assert all(b <= a + 1e-6 * abs(a) for a, b in pairwise(trace)), (name, kind)


def test_windows_drop_the_rest() -> None:
    import torch

    assert windows_of(torch.arange(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
