"""Conversions with several binary planes: what is written, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bwla_converter import hf  # noqa: F401 -- registers the format with transformers
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.checkpoint.layout import verify
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import check_folder
from paths import EXAMPLE
from transformers import AutoModelForCausalLM


@pytest.fixture
def options(make_model, tmp_path: Path) -> Options:
    vocabulary = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    model = make_model(vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, model)
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 60)
    return Options(
        str(model),
        tmp_path / "out",
        recipe="fast",
        planes=2,
        rank=2,
        calibration=Calibration(str(text), 6, 16),
    )


def test_a_checkpoint_with_two_planes(options: Options) -> None:
    summary = convert(options)
    verify(options.out)
    specs = check_folder(options.out)
    assert {spec.planes for spec in specs.values()} == {2}
    config = json.loads((options.out / "config.json").read_text())["quantization_config"]
    assert (config["format_version"], config["planes"]) == (2, 2)
    assert read_contents(options.out).bits["signs"] == pytest.approx(2.0)
    assert summary.bits_per_weight > 2.0
    model = AutoModelForCausalLM.from_pretrained(options.out)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        logits, expected = model(ids).logits.float(), original(ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - expected).norm() < 0.6 * expected.norm()


def test_more_planes_are_closer_to_the_original(options: Options) -> None:
    errors = [
        sum(linear.error for linear in convert(replace(options, planes=planes, overwrite=True)).linears)
        for planes in (1, 2, 3)
    ]
    assert errors[2] < 0.7 * errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_other_recipes_refuse_several_planes_before_any_work(options: Options, recipe: str) -> None:
    with pytest.raises(
        BWLAError, match=f"recipe '{recipe}' chooses the signs of one plane, found --planes 2"
    ):
        convert(replace(options, recipe=recipe))
    assert not options.out.exists()


def test_a_number_of_planes_out_of_range_is_refused(options: Options) -> None:
    with pytest.raises(BWLAError, match="planes must be 1..4, found 5"):
        convert(replace(options, planes=5))
