"""A model of each kind of decoder layer is served: the same answer as vLLM's own on the dequantized weights."""

from pathlib import Path

import pytest
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import read_json

from benchmarks.coverage import torchvision_stand_in
from benchmarks.coverage.build import TEXT_FILE, write_case
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


def test_planes_of_single_linears_in_a_multimodal_model(tmp_path: Path) -> None:
    """vLLM renames the linears of Gemma 4, whose planes and rotations the format keeps by their names."""
    case = CASES["gemma4"]
    source, mixed = tmp_path / ORIGINAL, tmp_path / "mixed"
    write_case(case, source)
    text = Calibration(str(source / TEXT_FILE), num_samples=8, max_seq_length=32)
    exact = {"bits": 16, "head_bits": 16, "embedding_bits": 16}
    convert(
        Options(
            str(source),
            mixed,
            target_bits=2.2,
            calibration=text,
            device="cpu",
            report=False,
            text_samples=0,
            **exact,
        )
    )
    planes = read_json(mixed / "config.json", SourceError)["quantization_config"]["planes"]
    assert len(set(planes.values())) > 1
    write_dequantized(mixed, tmp_path / "mixed-dequantized", case.dtype)
    reference, found = (
        run_step(Step("serve", form), case, tmp_path) for form in ("mixed-dequantized", "mixed")
    )
    difference = compare(reference, found)
    assert difference["same_tokens"]
    assert difference["largest_difference"] < TOLERANCE
