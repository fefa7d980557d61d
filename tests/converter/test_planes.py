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
from bwla_kernels.format import tensor_specs
from bwla_kernels.format.folder import check_folder, read_folder, read_tensors
from bwla_kernels.reference import dequantize
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
    card = (options.out / "README.md").read_text()
    assert "with weights of 2 binary planes and 6-bit activations" in card
    assert "--planes 2" in card
    assert "weights of 2 binary planes</h1>" in (options.out / "bwla_report.html").read_text()


def test_transformers_computes_with_the_sum_of_the_planes(options: Options) -> None:
    convert(replace(options, bits=16, head_bits=16, embedding_bits=16))
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    entries = read_folder(options.out)
    for name, spec in check_folder(options.out).items():
        stored = read_tensors(options.out, entries, [f"{name}.{key}" for key in tensor_specs(spec)])
        layer = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items()}
        original.get_submodule(name).weight.data = dequantize(layer, spec)
    original.model.norm.load_state_dict(model.model.norm.state_dict())
    ids = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)


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
