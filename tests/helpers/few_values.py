"""Tiny models whose weights have one bit or three values, in the forms in which such models are published."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.tiny_models import build_model

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
"""Widths that groups of 128 and 256 columns divide."""

FILE = "model.safetensors"


def is_linear(name: str) -> bool:
    """Return whether a tensor is the weight of a linear in a decoder layer."""
    return name.endswith("_proj.weight")


def in_two_values(weight: Tensor, size: int) -> Tensor:
    """Return a weight [N, K] that holds d and -d in each group of `size` columns, where d is a float16 value."""
    cells = weight.float().unflatten(1, (-1, size))
    scale = cells.abs().mean(-1, keepdim=True).half().float()
    return torch.where(cells >= 0, scale, -scale).flatten(1)


def in_three_values(weight: Tensor, size: int) -> Tensor:
    """Return a weight [N, K] that holds d, 0 and -d in each group of `size` columns, where d is a float16 value."""
    cells = weight.float().unflatten(1, (-1, size))
    scale = cells.abs().mean(-1, keepdim=True).half().float()
    values: Tensor = (cells / scale).round().clamp(-1, 1) * scale
    return values.flatten(1)


def few_values(family: str = "Qwen3", planes: int = 1, size: int = 128, **config: Any) -> PreTrainedModel:
    """Return a tiny model whose linears and embedding have two values (1 plane) or three (2) in each group."""
    model = build_model(family, lively=True, **{**SIZES, **config})
    change = in_two_values if planes == 1 else in_three_values
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(change(parameter, size))
            else:
                parameter.copy_(parameter.bfloat16())
    return model


def bitnet_model() -> PreTrainedModel:
    """Return a tiny model of BitNet b1.58's own architecture, with norms inside attention and MLP."""
    torch.manual_seed(0)
    settings = {**SIZES, "tie_word_embeddings": True, "max_position_embeddings": 128}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("bitnet", **settings, **tokens, architectures=["BitNetForCausalLM"])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            if is_linear(name):
                parameter.copy_(in_three_values(parameter, parameter.shape[1]))
    return model.eval()


def write_unpacked(folder: Path, model: PreTrainedModel) -> Path:
    """Write a model in float16, as "unpacked" versions are; return the folder."""
    copy.deepcopy(model).half().save_pretrained(folder)
    return folder


def write_bitnet(folder: Path, model: PreTrainedModel, linear_class: str = "bitlinear") -> Path:
    """Write a model of three values, one scale for each linear, as transformers stores BitNet; return the folder.

    The values of `model` are changed to those that are stored.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not is_linear(name):
            tensors[name] = tensor.bfloat16()
            continue
        largest = tensor.abs().max()
        scale = (largest if linear_class == "autobitlinear" else 1 / largest).bfloat16().reshape(1)
        codes = tensor.sign()
        rows = len(codes) // 4
        packed = sum((codes[i * rows : (i + 1) * rows] + 1).to(torch.uint8) << (2 * i) for i in range(4))
        assert isinstance(packed, Tensor)
        tensors[name] = packed
        tensors[f"{name}_scale"] = scale
        factor = scale.float() if linear_class == "autobitlinear" else 1 / scale.float()
        tensor.copy_(codes * factor)
    quantization = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    return _write(folder, model, tensors, {"quantization_config": quantization})


def write_mlx(folder: Path, model: PreTrainedModel, bits: int, size: int) -> Path:
    """Write a model of two values (1 bit) or three (2 bits) in each group, as MLX stores them; return the folder."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() != 2:
            tensors[name] = tensor.bfloat16()
            continue
        cells = tensor.unflatten(1, (-1, size))
        scale = cells.abs().amax(-1)
        step = 2 * scale if bits == 1 else scale
        codes = ((cells + scale.unsqueeze(-1)) / step.unsqueeze(-1)).round().long().flatten(1)
        words = codes.unflatten(1, (-1, 32 // bits))
        shifts = torch.arange(0, 32, bits)
        stem = name.removesuffix("weight")
        tensors[name] = (words << shifts).sum(-1).to(torch.uint32)
        tensors[f"{stem}scales"], tensors[f"{stem}biases"] = step.half(), (-scale).half()
    quantization = {"group_size": size, "bits": bits, "mode": "affine"}
    return _write(folder, model, tensors, {"quantization": quantization, "quantization_config": quantization})


def _write(folder: Path, model: PreTrainedModel, tensors: dict[str, Tensor], more: dict[str, Any]) -> Path:
    model.config.save_pretrained(folder)
    if model.config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, {"format": "pt"}
    )
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    return folder


def change_tensor(folder: Path, name: str, changed: Tensor | None) -> None:
    """Replace a stored tensor, or remove it."""
    tensors = load_file(folder / FILE)
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed
    save_file(tensors, folder / FILE, {"format": "pt"})


def change_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Change entries of the `quantization_config` of a model."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(settings)
    path.write_text(json.dumps(config))
