"""Conversions of mixtures of experts: what is written, what is said, and that an interruption changes nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from any_model import KINDS, build_any_model
from bwla_converter import hf  # noqa: F401 -- registers the format with transformers
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.checkpoint.layout import verify
from bwla_converter.evaluation.perplexity import perplexity
from bwla_converter.listener import Listener
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_kernels.format.experts import expert_of
from bwla_kernels.format.folder import check_folder
from bwla_kernels.format.layer import INPUT_TRANSFORM
from paths import EXAMPLE
from transformers import AutoModelForCausalLM

VOCABULARY = 2048
STACKED = "stacked experts, and a shared one"
BIASED = "transposed experts with biases"


def options_for(kind: str, folder: Path) -> Options:
    build_any_model(**{**KINDS[kind], "vocab_size": VOCABULARY}).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / "model")
    text = folder / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 60)
    return Options(
        str(folder / "model"),
        folder / "out",
        recipe="fast",
        bits=16,
        calibration=Calibration(str(text), 6, 16),
        report=False,
        text_samples=0,
    )


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return options_for("experts", tmp_path)


@pytest.mark.parametrize(("recipe", "rank"), [("fast", 2), ("paper", 1), ("data-free", 0)])
def test_a_checkpoint_with_one_bit_experts(options: Options, recipe: str, rank: int) -> None:
    text = None if recipe == "data-free" else options.calibration
    convert(replace(options, recipe=recipe, rank=rank, calibration=text))  # type: ignore[arg-type]
    verify(options.out)
    specs = check_folder(options.out)
    assert sum(expert_of(name) is not None for name in specs) == 2 * 4 * 3
    contents = read_contents(options.out)
    assert contents.format.experts is not None
    assert contents.format.format_version == 2
    transforms = [name for name in contents.entries if name.rpartition(".")[2] in INPUT_TRANSFORM]
    assert {expert_of(name.rpartition(".")[0]) for name in transforms} == {None, 0}


@pytest.mark.parametrize("kind", [STACKED, "experts under other names", BIASED])
def test_the_loss_that_is_measured_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    options = options_for(kind, tmp_path)
    convert(options)
    windows = torch.arange(4 * 16).reshape(4, 16) + 100
    original, quantized = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (options.model, options.out)
    )
    ratio = perplexity(quantized, windows) / perplexity(original, windows)
    # A random model knows nothing, so that little can be lost; a wrong tensor would change this much more.
    assert 0.5 < ratio < 2.0


def test_biases_reach_the_kernels_of_quantized_activations(tmp_path: Path) -> None:
    """Rows of the gate and of up alternate in the stacked biases, which kernels do not read."""
    options = replace(options_for(BIASED, tmp_path), bits=6)
    convert(options)
    specs = check_folder(options.out)
    assert {spec.bias for name, spec in specs.items() if expert_of(name) is not None} == {True}


def test_few_tokens_for_an_expert_are_reported(options: Options) -> None:
    [note] = [note for note in convert(options).notes if "calibration tokens" in note]
    assert "--num-calibration-samples" in note
    assert ".mlp.experts." in note
    plenty = replace(
        options, out=options.out.parent / "plenty", calibration=replace(options.calibration, num_samples=40)
    )
    assert not [note for note in convert(plenty).notes if "calibration tokens" in note]


class Interrupted(Listener):
    """Interrupts a conversion after its first decoder layer."""

    def layer_done(self, index: int) -> None:
        raise KeyboardInterrupt


def test_an_interruption_changes_no_byte(options: Options) -> None:
    convert(options)
    again = replace(options, out=options.out.parent / "again")
    with pytest.raises(KeyboardInterrupt):
        convert(again, Interrupted())
    convert(replace(again, resume=True))
    file = "model.safetensors"
    assert (again.out / file).read_bytes() == (options.out / file).read_bytes()


def test_planes_by_group(options: Options) -> None:
    summary = convert(replace(options, target_bits=2.6))
    contents = read_contents(options.out)
    assert len(summary.planes) > 1
    for names in ("gate_proj", "up_proj"), ("down_proj",):
        for index in range(2):
            planes = {
                spec.planes
                for name, spec in contents.specs.items()
                if f".layers.{index}.mlp.experts." in name and name.endswith(names)
            }
            assert len(planes) == 1
    assert all(".experts.*." in key or ".experts." not in key for key in contents.format.planes)  # type: ignore[union-attr]


def test_ignored_experts_are_copied(options: Options) -> None:
    convert(replace(options, ignore=("experts",)))
    contents = read_contents(options.out)
    assert contents.format.experts is None
    assert not any(expert_of(name) is not None for name in contents.specs)
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in contents.entries
