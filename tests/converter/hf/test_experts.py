"""Experts as linears: they compute what transformers' do, in one bit what the stored tensors say."""

import json
from pathlib import Path

import pytest
import torch
from any_model import KINDS, build_any_model, write_any_model
from bwla_converter.calibration.layer_runner import LayerRunner
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.checkpoint.dummy import write_dummy
from bwla_converter.hf.expert_linears import ExpertLinears, divide_experts
from bwla_converter.hf.expert_modules import BWLAExpertLinear
from bwla_converter.options import Options
from bwla_kernels.errors import FormatError
from bwla_kernels.format.files import read_folder, read_tensors
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

STACKED = "stacked experts, and a shared one"
BIASED = "transposed experts with biases"
EXPERT_KINDS = ["experts", STACKED, "experts under other names", BIASED]
IDS = torch.arange(3, 35).reshape(2, 16)


def write_checkpoint(kind: str, folder: Path) -> Path:
    """Write a random one-bit checkpoint with activations in 16 bits."""
    write_any_model(build_any_model(**KINDS[kind]), folder / "plain")
    out = folder / "bwla"
    write_dummy(Options(str(folder / "plain"), out, bits=16, rank=2, head_bits=16, embedding_bits=16))
    return out


def load(folder: Path) -> PreTrainedModel:
    import bwla_converter.hf  # noqa: F401

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_linears_compute_the_same_as_transformers_experts(kind: str, tmp_path: Path) -> None:
    model = build_any_model(**KINDS[kind])
    model.set_experts_implementation("eager")
    source = write_any_model(model, tmp_path)
    expected = model(IDS).logits
    for index, layer in enumerate(model.model.layers):
        divide_experts(layer, source.experts_of_layer(index))
    divided = [module for module in model.modules() if isinstance(module, ExpertLinears)]
    assert len(divided) == 2
    if kind == BIASED:  # products with the transposed weights are summed in another order
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(model(IDS).logits, expected)


def test_a_layer_finds_its_experts(tmp_path: Path) -> None:
    source = write_any_model(build_any_model(**KINDS["experts under other names"]), tmp_path)
    layer = LayerRunner(source, torch.device("cpu")).layer(0, source.read(source.names_of_layer(0)))
    experts = layer.experts_of("model.layers.0.block_sparse_moe.experts.1.w2")
    assert experts is layer.layer.mlp.experts
    assert isinstance(experts, ExpertLinears)
    assert experts.is_down("w2")
    assert not experts.is_down("w3")
    assert layer.experts_of("model.layers.0.self_attn.q_proj") is None
    linear = layer.linear("model.layers.0.block_sparse_moe.experts.1.w2")
    assert isinstance(linear, nn.Linear)
    assert (linear.out_features, linear.in_features) == (64, 128)


@torch.no_grad()
@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_transformers_loads_and_saves_one_bit_experts(kind: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(kind, tmp_path)
    model = load(checkpoint)
    assert any(isinstance(module, BWLAExpertLinear) for module in model.modules())
    write_dequantized(checkpoint, tmp_path / "plain-again", "float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain-again", dtype=torch.float32)
    logits = model(IDS).logits
    torch.testing.assert_close(logits, plain(IDS).logits, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    before, after = read_folder(checkpoint), read_folder(tmp_path / "saved")
    assert before.keys() == after.keys()
    stored = read_tensors(checkpoint, before, list(before))
    saved = read_tensors(tmp_path / "saved", after, list(after))
    for name, tensor in stored.items():
        assert torch.equal(tensor.to(saved[name].dtype), saved[name]), name
    assert torch.equal(load(tmp_path / "saved")(IDS).logits, logits)


@pytest.mark.parametrize("kind", ["experts under other names", "other names"])
def test_tensors_that_transformers_renames_get_the_dtype_that_was_asked_for(
    kind: str, tmp_path: Path
) -> None:
    model = load(write_checkpoint(kind, tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_with_fewer_experts_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("experts", tmp_path)
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["num_local_experts"] = 3  # transformers' name of num_experts
    del config["quantization_config"]["config"]["num_local_experts"]  # else the check of the config is first
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="expected 3 experts"):
        load(checkpoint)
