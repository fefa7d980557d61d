"""Conversions with a head in binary planes: what is written, what reads it, resuming, and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bwla_converter import hf  # noqa: F401 -- registers the format with transformers
from bwla_converter.calibration.text import calibration_samples
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.checkpoint.dummy import write_dummy
from bwla_converter.checkpoint.layout import verify
from bwla_converter.describe import describe_conversion
from bwla_converter.evaluation.loss import measure_loss
from bwla_converter.evaluation.perplexity import perplexity
from bwla_converter.listener import Listener
from bwla_converter.options import Calibration, LinearReport, Options
from bwla_converter.pipeline import convert
from bwla_converter.source.model import open_source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import check_folder
from paths import EXAMPLE
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def options(make_model, tmp_path: Path, request: pytest.FixtureRequest) -> Options:
    vocabulary = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    model = make_model(vocab_size=vocabulary, tie_word_embeddings=request.param)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, model)
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 60)
    calibration = Calibration(str(text), 6, 16)
    return Options(str(model), tmp_path / "out", recipe="fast", rank=2, head_bits=3, calibration=calibration)


def logits_of(folder: Path | str, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def test_what_is_written(options: Options) -> None:
    summary = convert(options)
    verify(options.out)
    contents = read_contents(options.out)
    assert contents.head_spec is not None
    assert (contents.head_bits, contents.head_spec.planes, contents.head_spec.rank) == (3, 3, 2)
    # Bits per weight are those of the decoder layers, whatever the head has.
    assert "lm_head" not in contents.specs
    assert summary.bits_per_weight == pytest.approx(contents.bits_per_weight)
    assert contents.bits["signs"] == pytest.approx(1.0)
    assert "lm_head.weight" not in contents.entries
    assert "lm_head.weight_int8" not in contents.entries
    config = json.loads((options.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head" not in config["quantization_config"]["ignore"]
    tensors = load_file(options.out / "model.safetensors")
    assert summary.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    assert "--lm-head-bits 3" in (options.out / "README.md").read_text()
    assert "--planes" not in (options.out / "README.md").read_text()
    assert json.loads((options.out / "bwla_report.json").read_text())["head_bits"] == 3


def test_transformers_and_the_dequantized_model_agree(options: Options, tmp_path: Path) -> None:
    convert(replace(options, bits=16, report=False))
    write_dequantized(options.out, tmp_path / "plain", "float32")
    ids = torch.arange(3, 19).unsqueeze(0)
    found, plain = logits_of(options.out, ids), logits_of(tmp_path / "plain", ids)
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)


def test_the_measured_loss_is_that_of_the_whole_model(options: Options) -> None:
    convert(replace(options, bits=16, report=False))
    ids = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(0))
    original, quantized = (
        perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
        for folder in (options.model, options.out)
    )
    source = open_source(options.model, ())
    found = measure_loss(source, options.out, ids, torch.device("cpu"))
    assert found == pytest.approx(math.log(quantized / original), abs=2e-3)


def test_a_head_with_more_planes_is_closer_to_one_of_16_bits(options: Options) -> None:
    ids = torch.arange(3, 35).unsqueeze(0)
    distance = {}
    exact = replace(options, bits=16, report=False, embedding_bits=16)
    convert(replace(exact, head_bits=16, out=options.out.with_name("exact")))
    wanted = logits_of(options.out.with_name("exact"), ids)
    for planes in (2, 4):
        convert(replace(exact, head_bits=planes, overwrite=True))
        distance[planes] = float((logits_of(options.out, ids) - wanted).norm() / wanted.norm())
    assert distance[4] < 0.5 * distance[2] < 0.5


def test_planes_allocated_by_size(options: Options) -> None:
    convert(replace(options, rank=None, target_bits=3.0, report=False))
    verify(options.out)
    planes = {name: spec.planes for name, spec in check_folder(options.out).items()}
    assert planes.pop("lm_head") == 3
    assert set(planes.values()) <= {1, 2, 3, 4}


def test_best_distills_behind_it(options: Options) -> None:
    convert(replace(options, recipe="best", tune_epochs=1, distill_epochs=1, report=False))
    verify(options.out)
    ids, _ = calibration_samples(options.calibration, Path(options.model), 0)
    assert bool(logits_of(options.out, ids[:1]).isfinite().all())


def test_an_interrupted_head_is_resumed(options: Options) -> None:
    class Stops(Listener):
        def head_started(self, planes: int) -> None:
            raise KeyboardInterrupt

    whole = replace(options, out=options.out.with_name("whole"), report=False)
    heard: list[str] = []

    class Hears(Listener):
        def linear_quantized(self, linear: LinearReport) -> None:
            heard.append(linear.name)

    convert(whole, Hears())
    assert heard[-1] == "lm_head"
    with pytest.raises(KeyboardInterrupt):
        convert(replace(options, report=False), Stops())
    convert(replace(options, report=False, resume=True))
    first, again = (load_file(out / "model.safetensors") for out in (whole.out, options.out))
    assert first.keys() == again.keys()
    assert [name for name, tensor in first.items() if not torch.equal(tensor, again[name])] == []


def test_a_random_checkpoint(options: Options) -> None:
    write_dummy(replace(options, calibration=None, head_bits=4))
    assert check_folder(options.out)["lm_head"].planes == 4


def test_the_plan_names_it(options: Options) -> None:
    assert "head lm_head: 3 binary planes" in describe_conversion(options)


@pytest.mark.parametrize("recipe", ["data-free", "paper"])
def test_recipes_of_one_plane_refuse_it_before_any_work(options: Options, recipe: str) -> None:
    with pytest.raises(BWLAError, match=f"recipe '{recipe}' does not quantize the head.*--lm-head-bits 3"):
        convert(replace(options, recipe=recipe))
    assert not options.out.exists()
