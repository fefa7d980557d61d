"""`bwla-convert` as a user types it."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bwla_converter.cli.convert import app
from bwla_converter.conversion import with_calibration
from bwla_converter.options import SELF, Calibration, Options
from bwla_converter.recipes.best import BestOptions
from bwla_kernels.errors import BWLAError
from typer.testing import CliRunner

run = partial(CliRunner().invoke, env={"COLUMNS": "160"})
"""Run a command on a terminal so wide that no message is wrapped."""


def test_help_has_panels_and_examples() -> None:
    result = run(app, ["--help"])
    assert result.exit_code == 0
    titles = [line.split("─")[1].strip() for line in result.output.splitlines() if line.startswith("╭─")]
    assert titles == [
        "Arguments",
        "Options",
        "Model and output",
        "Quantization",
        "Calibration (recipes paper, fast and best)",
        "Training (recipe best)",
        "Resume",
        "Machine",
        "Reporting and publishing",
    ]
    assert "bwla-convert Qwen/Qwen3-8B ./qwen3-8b-bwla" in result.output
    assert "--rank" in result.output


@pytest.mark.parametrize("command", ["convert", "evaluate", "inspect"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; from bwla_converter.cli.{command} import app; app(['--help'], standalone_mode=False);"
        "print(sorted({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("option", ["--samples", "--length"])
def test_the_old_names_of_options_lead_to_the_new_ones(option: str) -> None:
    result = run(app, ["model", "out", option, "64"])
    assert result.exit_code == 2
    assert "now called --num-calibration-samples and --max-seq-length" in result.output
    assert "--samples " not in run(app, ["--help"]).output


@pytest.mark.parametrize(
    ("flags", "choices"),
    [
        (["--recipe", "magic"], ("data-free", "paper", "fast", "best")),
        (["--lm-head-bits", "5"], ("auto", "2", "3", "4", "8", "16")),
        (["--device", "tpu"], ("auto", "cpu", "cuda")),
    ],
)
def test_choices_are_checked(flags: list[str], choices: tuple[str, ...]) -> None:
    result = run(app, ["model", "out", *flags])
    assert result.exit_code == 2
    assert f"Invalid value for '{flags[0]}'" in result.output
    assert all(choice in result.output for choice in choices)


def test_every_option_reaches_the_conversion(tmp_path: Path, monkeypatch) -> None:
    received: list[Options] = []

    def convert(options: Options, *_: object, **__: object) -> None:
        received.append(options)
        raise BWLAError("enough")

    monkeypatch.setattr("bwla_converter.pipeline.convert", convert)
    flags = (
        "--recipe best --rank 3 --abits 4 --clip 0.9 --lm-head-bits 8 --ignore a --ignore b --seed 5 --overwrite "
        "--calibration text --num-calibration-samples 7 --max-seq-length 9 --tune-epochs 1 --distill-epochs 2 "
        "--minutes 3 --resume --restart --device cpu --max-memory 1GB --no-report --samples-of-text 4"
    )
    result = run(app, ["model", str(tmp_path / "out"), *flags.split()])
    assert "error: enough" in result.output
    assert received == [
        Options(
            "model",
            tmp_path / "out",
            recipe="best",
            rank=3,
            bits=4,
            clip=0.9,
            seed=5,
            overwrite=True,
            head_bits=8,
            ignore=("a", "b"),
            calibration=Calibration("text", 7, 9),
            tune_epochs=1,
            distill_epochs=2,
            minutes=3.0,
            resume=True,
            restart=True,
            device="cpu",
            max_memory=10**9,
            report=False,
            text_samples=4,
        )
    ]


def test_help_shows_the_defaults_of_recipe_best() -> None:
    output = " ".join(run(app, ["--help"]).output.replace("│", " ").split())
    best = BestOptions()
    assert f"0 to skip tuning. [default: ({best.tune.epochs})]" in output
    assert f"0 to skip distillation. [default: ({best.distill.epochs})]" in output


def test_without_options_the_defaults_are_those_of_python(tmp_path: Path, monkeypatch) -> None:
    received: list[Options] = []
    monkeypatch.setattr("bwla_converter.pipeline.convert", lambda options, *_, **__: received.append(options))
    for flags in ([], ["--calibration", "text"], ["--recipe", "data-free"]):
        run(app, ["model", str(tmp_path / "out"), *flags])
    plain = Options("model", tmp_path / "out")
    assert with_calibration(plain).calibration == Calibration(SELF)
    assert received == [
        with_calibration(plain),
        replace(plain, calibration=Calibration("text")),
        replace(plain, recipe="data-free"),
    ]


def test_version_names_what_matters() -> None:
    result = run(app, ["--version"])
    assert result.exit_code == 0
    for package in ("bwla", "torch", "transformers", "safetensors"):
        assert package in result.output


def test_a_conversion_ends_with_a_summary(make_model, tmp_path: Path) -> None:
    result = run(
        app,
        [str(make_model()), str(tmp_path / "out"), "--recipe", "data-free", "--rank", "1", "--abits", "8"],
    )
    assert result.exit_code == 0, result.output
    assert "bits per quantized weight, everything counted, rank 1, " in result.output
    assert "recipe data-free makes most pretrained models unusable: use --recipe fast" in result.output
    assert "model.layers.1.mlp.down_proj  relative error" in result.output
    assert (tmp_path / "out" / "config.json").is_file()


def test_bad_input_is_one_sentence_and_a_failure(tmp_path: Path) -> None:
    result = run(app, [str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "error:" in result.output
    assert "expected a folder, a GGUF file or a Hub id" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", ["many", "-1", "1.5"])
def test_a_rank_is_auto_or_a_number(rank: str, tmp_path: Path) -> None:
    result = run(app, ["model", str(tmp_path / "out"), f"--rank={rank}"])
    assert result.exit_code == 2
    assert "expected auto or a number" in result.output


def fails(error: Exception):
    def convert(*_: object, **__: object) -> None:
        raise error

    return convert


def test_out_of_memory_is_one_sentence_that_says_how_to_continue(
    make_model, tmp_path: Path, monkeypatch
) -> None:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        monkeypatch.setattr("bwla_converter.pipeline.convert", fails(error))
    result = run(app, [str(make_model()), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "error: out of memory" in result.output
    assert "no layer is finished yet" in result.output
    assert "Traceback" not in result.output


def test_another_error_of_torch_is_not_called_out_of_memory(make_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bwla_converter.pipeline.convert", fails(RuntimeError("shapes do not match")))
    result = run(app, [str(make_model()), str(tmp_path / "out")])
    assert isinstance(result.exception, RuntimeError)
    assert "out of memory" not in result.output


def test_a_gguf_file(make_gguf, tmp_path: Path) -> None:
    arguments = [str(make_gguf("Llama")), str(tmp_path / "out"), "--recipe", "data-free", "--rank", "2"]
    result = run(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"dequantizing to bfloat16 into {tmp_path / 'cache' / 'gguf' / 'model'}-" in result.output
    result = run(app, [*arguments, "--overwrite"])
    assert result.exit_code == 0, result.output
    assert "dequantizing" not in result.output


def test_a_plan_needs_a_config_and_no_output(make_model) -> None:
    folder = make_model(intermediate_size=100)
    (folder / "model.safetensors").unlink()
    result = run(app, ["--plan", str(folder), "--rank", "2", "--ignore", "o_proj", "--recipe", "data-free"])
    assert result.exit_code == 0, result.output
    for line in (
        "decoder layers 0 to 1:",
        "in 16 bits: mlp.down_proj (an input width must be a positive multiple of 32, found 100)",
        "in 16 bits: o_proj (--ignore)",
        "embedding model.embed_tokens: 8 bits",
    ):
        assert line in result.output.splitlines()
    assert "  mlp.gate_proj, mlp.up_proj: 200 x 64, " in result.output
    assert "recipe data-free, expected: " in result.output


def test_the_output_is_needed_without_a_plan(make_model) -> None:
    result = run(app, [str(make_model())])
    assert result.exit_code == 2
    assert "expected the folder to create, found none" in result.output
