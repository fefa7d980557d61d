"""Random checkpoints: valid for every family, from a config.json alone."""

from pathlib import Path

import bwla_converter.hf  # noqa: F401 - registers the quantizer
import pytest
import torch
from bwla_converter.checkpoint.dummy import write_dummy
from bwla_converter.checkpoint.layout import verify
from bwla_converter.cli.convert import app
from bwla_converter.options import Options
from bwla_kernels.errors import SourceError
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from benchmarks.common.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_its_config_alone(make_model, tmp_path: Path, family: str) -> None:
    folder, out = make_model(family), tmp_path / "out"
    (folder / "model.safetensors").unlink()
    plan = write_dummy(Options(str(folder), out, rank=2, recipe="data-free"))
    verify(out)
    assert {spec.rank for spec in plan.specs.values()} == {2}
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert torch.isfinite(model(torch.arange(16).view(1, 16)).logits).all()


def test_from_the_command_line(make_model, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, [str(make_model()), str(tmp_path / "out"), "--dummy", "--lm-head-bits", "8"]
    )
    assert result.exit_code == 0, result.output
    assert "random weights" in result.output
    verify(tmp_path / "out")


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json: cannot be read"):
        write_dummy(Options(str(tmp_path), tmp_path / "out", recipe="data-free"))
