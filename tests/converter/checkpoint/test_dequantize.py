"""A dequantized model computes what the BWLA model computes without activation quantization."""

import json
from pathlib import Path

import pytest
import torch
from bwla_converter.checkpoint import dequantize as module
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.checkpoint.dequantize import dequantized_bytes, write_dequantized
from bwla_converter.hf import modules as hf
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels.errors import BWLAError, FormatError
from bwla_kernels.format.folder import read_folder
from transformers import AutoModelForCausalLM

IDS = torch.arange(24).view(1, 24)


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()(IDS).logits
    return result.float()


@pytest.mark.parametrize(
    ("family", "tied", "bits"),
    [
        ("Qwen2", False, {"head_bits": 16}),
        ("Llama", False, {"embedding_bits": 16}),
        ("Qwen3", True, {}),
        ("Gemma 3", True, {}),
    ],
)
def test_logits_are_those_of_the_checkpoint(
    make_model, tmp_path: Path, monkeypatch, family: str, tied: bool, bits: dict[str, int]
) -> None:
    checkpoint, plain = tmp_path / "bwla", tmp_path / "plain"
    model = make_model(family, tie_word_embeddings=tied)
    convert(Options(str(model), checkpoint, rank=2, bits=16, recipe="data-free", **bits))
    # More than one piece to a weight.
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1000)
    done = write_dequantized(checkpoint, plain, "float32")
    assert done.linears == 14
    monkeypatch.setenv(hf.BACKEND_VARIABLE, "torch")
    before, after = logits(checkpoint), logits(plain)
    # The 8-bit head also rounds its inputs, to 16 bits.
    assert (before - after).abs().max() < 2e-4 * before.abs().max()


def test_bfloat16_is_close_and_has_no_trace_of_quantization(example_bwla: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    names: list[str] = []
    done = write_dequantized(example_bwla, plain, on_linear=names.append)
    assert len(names) == done.linears == 28
    config = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True  # the head is the 8-bit embedding
    entries = read_folder(plain)
    assert {entry.dtype for entry in entries.values()} == {torch.bfloat16}
    assert not [name for name in entries if "packed" in name or "scale" in name]
    contents = read_contents(example_bwla)
    assert done.bytes == dequantized_bytes(contents, torch.bfloat16)
    assert (plain / "tokenizer.json").is_file()
    write_dequantized(example_bwla, tmp_path / "exact", "float32")
    exact, rounded = logits(tmp_path / "exact"), logits(plain)
    assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_invalid_requests_raise_and_leave_nothing(example_bwla: Path, tmp_path: Path) -> None:
    with pytest.raises(BWLAError, match="expected one of bfloat16, float16, float32, found 'int4'"):
        write_dequantized(example_bwla, tmp_path / "plain", "int4")
    with pytest.raises(BWLAError, match="is the checkpoint itself"):
        write_dequantized(example_bwla, example_bwla, overwrite=True)
    (tmp_path / "taken").mkdir()
    with pytest.raises(BWLAError, match="already exists"):
        write_dequantized(example_bwla, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_damage_is_noticed_before_the_output_exists(make_model, tmp_path: Path, edit) -> None:
    checkpoint = tmp_path / "bwla"
    convert(Options(str(make_model()), checkpoint, recipe="data-free"))
    name = "model.layers.1.mlp.up_proj.weight_scale"
    edit.tensor(checkpoint / read_folder(checkpoint)[name].file, name, lambda t: -t)
    with pytest.raises(FormatError, match="expected positive scales"):
        write_dequantized(checkpoint, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_values_beyond_float16_are_refused(make_model, tmp_path: Path, edit) -> None:
    checkpoint = tmp_path / "bwla"
    convert(Options(str(make_model()), checkpoint, recipe="data-free"))
    name = "model.layers.0.mlp.down_proj.weight_scale"
    edit.tensor(checkpoint / read_folder(checkpoint)[name].file, name, lambda t: t * 1e7)
    with pytest.raises(BWLAError, match="choose --dtype bfloat16 or float32"):
        write_dequantized(checkpoint, tmp_path / "plain", "float16")
