"""`bwla-inspect` as a user types it."""

import json
import shutil
from pathlib import Path

import pytest
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.cli.inspect import app
from bwla_converter.report.model_card import command
from typer.testing import CliRunner


def run(*arguments: str | Path):
    # Wide enough that no table is cut.
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


@pytest.fixture
def copy(example_bwla: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(example_bwla, tmp_path / "copy"))


def test_a_checkpoint_in_tables(example_bwla: Path) -> None:
    done = run(example_bwla)
    assert done.exit_code == 0, done.output
    report = json.loads((example_bwla / "bwla_report.json").read_text())
    assert f"{report['bits_per_weight']:.4f} bits per quantized weight" in done.stdout
    assert f"{report['bytes_after']:,}" in done.stdout
    assert "intact:" in done.stdout
    assert "recipe       data-free, seed 0" in done.stdout
    assert "model.layers.0" not in done.stdout
    (down,) = [line for line in done.stdout.splitlines() if "down_proj" in line]
    assert "192 x 512" in down


def test_every_layer_on_request(example_bwla: Path) -> None:
    done = run(example_bwla, "--layers", "--no-hashes")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("model.layers.") == 28
    assert "integrity    not checked" in done.stdout


def test_json_holds_everything_and_adds_up(example_bwla: Path) -> None:
    done = run(example_bwla, "--json")
    data = json.loads(done.stdout)
    assert len(data["layers"]) == 28
    assert sum(layer["bytes"] for layer in data["layers"]) == data["bytes"]["quantized linears"]
    assert data["integrity"]["intact"] is True
    assert data["format"]["provenance"]["recipe"] == "data-free"
    assert data["files"]["config.json"] == (example_bwla / "config.json").stat().st_size


def test_damage_is_exit_status_1(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = run(copy)
    assert done.exit_code == 1
    assert f"NOT INTACT: changed: {shard.name}" in done.stdout
    data = json.loads(run(copy, "--json").stdout)
    assert data["integrity"]["changed"] == [shard.name]
    assert run(copy, "--no-hashes").exit_code == 0
    # A damaged checkpoint is not exported.
    assert run(copy, "--dequantize", copy.parent / "dense").exit_code == 1
    assert not (copy.parent / "dense").exists()


def test_a_checkpoint_without_hashes_is_shown_as_such(copy: Path) -> None:
    (copy / "bwla_hashes.json").unlink()
    done = run(copy)
    assert done.exit_code == 0
    assert "no bwla_hashes.json" in done.stdout


def test_a_folder_without_a_checkpoint_is_an_error_message(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.exit_code == 1
    assert "error:" in done.stderr
    assert "Traceback" not in done.output


def test_a_plain_model_is_written(copy: Path) -> None:
    done = run(copy, "--dequantize", copy.parent / "dense", "--dtype", "float32")
    assert done.exit_code == 0, done.output
    assert "28 linears dequantized" in done.stderr
    assert "activations are not quantized" in done.stderr
    assert (copy.parent / "dense" / "config.json").is_file()
    again = run(copy, "--dequantize", copy.parent / "dense")
    assert again.exit_code == 1
    assert "already exists" in again.stderr


def test_figures_go_into_the_card(copy: Path, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    result.write_text(
        json.dumps({"text": "t", "window": 8, "results": {"perplexity": {"original": 2, "bwla": 3}}})
    )
    assert run(copy, "--evaluation", result).exit_code == 0
    assert "| perplexity | 2 | 3 |" in (copy / "README.md").read_text()
    assert "intact:" in run(copy).stdout


def test_a_checkpoint_of_the_recipe_formerly_called_paper_is_read(copy: Path, edit) -> None:
    """Checkpoints that were written before the recipe was renamed have no calibration text and say "paper"."""
    config = json.loads((copy / "config.json").read_text())["quantization_config"]
    config["provenance"]["recipe"] = "paper"
    edit.json(copy / "config.json", quantization_config=config)
    done = run(copy, "--no-hashes")
    assert done.exit_code == 0, done.output
    assert "recipe       data-free, seed 0" in done.stdout
    assert "--recipe data-free" in command(read_contents(copy))
