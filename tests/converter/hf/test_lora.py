"""PEFT's adapters on quantized linears in transformers: what PEFT reads of a layer, and PEFT itself."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bwla_converter.hf import modules as hf
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from torch import nn
from transformers import AutoModelForCausalLM

IDS = torch.arange(24).view(1, 24)
RANK = 8


@pytest.fixture
def model(make_model, tmp_path: Path) -> Any:
    """A converted model with biases and an 8-bit head."""
    out = tmp_path / "out"
    convert(Options(str(make_model("Qwen2", dtype=torch.float32)), out, rank=2, recipe="data-free"))
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def test_what_peft_reads_of_a_layer(model: Any) -> None:
    """peft/tuners: `dispatch_default`, `_get_in_out_features`, `_get_base_layer_device_and_dtype` (PEFT 0.19)."""
    found = [module for module in model.modules() if isinstance(module, hf.BWLALinear | hf.BWLAHead)]
    assert len(found) == 15
    for layer in found:
        assert isinstance(layer, nn.Linear)
        assert layer.weight is None, "a merge into it must not silently do nothing"
        assert (layer.out_features, layer.in_features) == (layer.spec.out_features, layer.spec.in_features)
        assert not layer.qweight.is_floating_point()  # so that PEFT does not take its dtype for the adapter's
        assert layer.qweight.device.type == "cpu"
        assert layer.to("meta").qweight.device.type == "meta"
    biased = model.model.layers[0].self_attn.q_proj
    assert "bias" not in dict(biased.named_parameters())
    assert isinstance(biased.bias, torch.Tensor)
    assert model.model.layers[0].mlp.up_proj.bias is None


class Adapted(nn.Module):
    """PEFT's `lora.Linear` in short: the layer's output plus that of the adapter."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        return y + self.lora_B(self.lora_A(x))


@torch.no_grad()
def test_an_adapter_is_added_to_the_layers_output(model: Any) -> None:
    torch.manual_seed(0)
    before = model(IDS).logits
    linears = {name: module for name, module in model.named_modules() if isinstance(module, hf.BWLALinear)}
    for name, linear in linears.items():
        model.set_submodule(name, Adapted(linear))
    assert (model(IDS).logits - before).abs().max() > 1e-2
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    assert torch.equal(model(IDS).logits, before)


@torch.no_grad()
def test_peft_itself(model: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = model(IDS).logits
    config = peft.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    after = adapted(IDS).logits
    assert (after - before).abs().max() > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(adapted.unload(), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, after)


def test_peft_trains_an_adapter(model: Any) -> None:
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.2
