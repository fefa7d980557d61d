"""A model of each kind of decoder layer is served: the same answer as vLLM's own on the dequantized weights."""

from pathlib import Path

import pytest

from benchmarks.coverage import torchvision_stand_in
from benchmarks.coverage.cases import CASES, SELECTION
from benchmarks.coverage.rows import compare
from benchmarks.coverage.steps import NEW_TOKENS, ORIGINAL, Step, run_step

SERVED = [
    "attention and MLP read the same input",
    "convolutions",
    "experts",
    "a decoder in a multimodal model",
]
"""The kinds of decoder layers that no other test serves and that vLLM computes in float32 on the CPU."""

TOLERANCE = 1e-3
RECIPE = "data-free"


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> None:
    """What vLLM's multimodal classes import."""
    torchvision_stand_in.install()


@pytest.mark.parametrize("kind", SERVED)
def test_the_answer_is_that_of_the_dequantized_weights(kind: str, tmp_path: Path) -> None:
    case = CASES[SELECTION[kind]]
    assert case.dtype == "float32"
    for action, form in (("build", ORIGINAL), ("convert", RECIPE), ("dequantize", RECIPE)):
        run_step(Step(action, form), case, tmp_path)
    reference, found = (
        run_step(Step("serve", form), case, tmp_path) for form in (f"{RECIPE}-dequantized", RECIPE)
    )
    assert len(found["tokens"]) == NEW_TOKENS
    difference = compare(reference, found)
    assert difference["same_tokens"]
    assert difference["largest_difference"] < TOLERANCE
