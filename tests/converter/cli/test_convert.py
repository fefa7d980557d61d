"""`bwla-convert` as a user types it."""

from pathlib import Path

import pytest
import torch
from bwla_converter.cli.convert import app
from typer.testing import CliRunner

run = CliRunner().invoke


def test_help_has_examples() -> None:
    result = run(app, ["--help"])
    assert result.exit_code == 0
    assert "bwla-convert Qwen/Qwen3-8B ./qwen3-8b-bwla" in result.output
    assert "--rank" in result.output


def test_version_names_what_matters() -> None:
    result = run(app, ["--version"])
    assert result.exit_code == 0
    for package in ("bwla", "torch", "transformers", "safetensors"):
        assert package in result.output


def test_a_conversion_ends_with_a_summary(make_model, tmp_path: Path) -> None:
    result = run(app, [str(make_model()), str(tmp_path / "out"), "--rank", "1", "--abits", "8"])
    assert result.exit_code == 0, result.output
    assert "bits per quantized weight all-in, rank 1, " in result.output
    assert "for far better text: --recipe fast --calibration TEXT" in result.output
    assert "model.layers.1.mlp.down_proj  relative error" in result.output
    assert (tmp_path / "out" / "config.json").is_file()


def test_bad_input_is_one_sentence_and_a_failure(tmp_path: Path) -> None:
    result = run(app, [str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "error:" in result.output
    assert "expected a folder or a Hub id" in result.output
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


def test_out_of_memory_is_one_sentence_that_says_how_to_go_on(
    make_model, tmp_path: Path, monkeypatch
) -> None:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        monkeypatch.setattr("bwla_converter.pipeline.convert", fails(error))
    result = run(app, [str(make_model()), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "error: out of memory" in result.output
    assert "nothing was finished yet" in result.output
    assert "Traceback" not in result.output


def test_another_error_of_torch_is_not_called_out_of_memory(make_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("bwla_converter.pipeline.convert", fails(RuntimeError("shapes do not match")))
    result = run(app, [str(make_model()), str(tmp_path / "out")])
    assert isinstance(result.exception, RuntimeError)
    assert "out of memory" not in result.output
