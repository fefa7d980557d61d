"""Checkpoints with one-bit experts, which store the input transform once for a layer: sizes, checks, weights."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from any_decoder import Experts, write_checkpoint, write_source
from bwla_converter.checkpoint.contents import LINEARS, read_contents
from bwla_converter.checkpoint.dequantize import dequantized_bytes, write_dequantized
from bwla_converter.checkpoint.layout import verify
from bwla_converter.cli.inspect import app
from bwla_kernels.errors import FormatError
from bwla_kernels.format.experts import kind_of
from bwla_kernels.format.files import read_folder, read_tensors
from bwla_kernels.format.layer import INPUT_TRANSFORM
from bwla_kernels.reference import dequantize
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.coverage.build import make_config
from benchmarks.coverage.cases import CASES

GATE = "model.layers.1.mlp.experts.3.gate_proj"
FIRST = "model.layers.1.mlp.experts.0.gate_proj"


def everything(folder: Path) -> dict[str, Tensor]:
    entries = read_folder(folder)
    return read_tensors(folder, entries, list(entries))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts, beside the model that it was made from; leave it as it is."""
    folder = tmp_path_factory.mktemp("experts")
    write_source(folder / "source", transformers.Qwen3MoeForCausalLM, make_config(CASES["qwen3_moe"]))
    write_checkpoint(folder / "source", folder / "out", experts=Experts(planes=2))
    return folder / "out"


def test_what_is_stored_is_counted_once(checkpoint: Path) -> None:
    contents = read_contents(checkpoint)
    assert contents.bits_per_weight * contents.weights == pytest.approx(8 * contents.bytes[LINEARS])
    names = [name for name in contents.entries if name.rpartition(".")[2] in INPUT_TRANSFORM]
    assert len([name for name in names if ".experts." in name]) == 2 * 3 * len(INPUT_TRANSFORM)
    assert kind_of(GATE) == "experts.*.gate_proj"
    assert kind_of("model.layers.1.self_attn.q_proj") == "q_proj"


def test_they_are_inspected(checkpoint: Path) -> None:
    shown = CliRunner().invoke(app, [str(checkpoint), "--no-hashes"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    (row,) = [line for line in shown.stdout.splitlines() if "experts.*.down_proj" in line]
    assert row.replace("│", " ").split()[:5] == ["experts.*.down_proj", "8", "64", "x", "64"]
    data = json.loads(CliRunner().invoke(app, [str(checkpoint), "--no-hashes", "--json"]).stdout)
    assert sum(layer["bytes"] for layer in data["layers"]) == data["bytes"][LINEARS]
    assert data["format"]["experts"] == {"input_transform": "first"}


def test_dequantized_weights_have_the_names_of_the_source(checkpoint: Path, tmp_path: Path) -> None:
    done = write_dequantized(checkpoint, tmp_path / "plain", "float32")
    contents = read_contents(checkpoint)
    assert done.bytes == dequantized_bytes(contents, torch.float32)
    stored, plain = everything(checkpoint), everything(tmp_path / "plain")
    assert plain.keys() == read_folder(checkpoint.parent / "source").keys()
    transform = {key: stored[f"{FIRST}.{key}"] for key in INPUT_TRANSFORM}
    own = {key: stored[f"{GATE}.{key}"] for key in ("weight_packed", "weight_scale", "low_rank_b")}
    assert torch.equal(plain[f"{GATE}.weight"], dequantize({**transform, **own}, contents.specs[GATE]))
    other = {key: stored[f"model.layers.0.mlp.experts.0.gate_proj.{key}"] for key in INPUT_TRANSFORM}
    assert not torch.equal(plain[f"{GATE}.weight"], dequantize({**other, **own}, contents.specs[GATE]))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (f"{GATE}.weight_scale", -1.0, r"experts.3.gate_proj.weight_scale: expected positive scales"),
        (f"{FIRST}.rotation_left", 1.0, r"gate_proj.rotation_left: expected an orthogonal matrix"),
    ],
)
def test_a_finished_checkpoint_is_read_back(
    name: str, value: float, sentence: str, checkpoint: Path, tmp_path: Path
) -> None:
    verify(checkpoint)
    tensors = everything(checkpoint)
    tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(FormatError, match=sentence):
        verify(tmp_path)
