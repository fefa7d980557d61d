"""One model of each kind of decoder layer is converted: what is quantized, and that everything else is as it was."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from bwla_converter.checkpoint.layout import verify
from bwla_kernels.format.files import read_folder, read_tensors
from bwla_kernels.format.folder import check_folder
from torch import Tensor

from benchmarks.coverage.cases import CASES, SELECTION
from benchmarks.coverage.steps import ORIGINAL, Step, run_step

_ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
_MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
_EXPERTS = {f"mlp.experts.{number}.{name}_proj" for number in range(4) for name in ("gate", "up", "down")}

QUANTIZED: Mapping[str, tuple[set[str], set[str]]] = {
    "phi3": (
        {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
        {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    ),
    "cohere2": (_ATTENTION | _MLP, _ATTENTION | _MLP),
    "lfm2": (
        {"conv.in_proj", "conv.out_proj", *(f"feed_forward.w{i}" for i in (1, 2, 3))},
        {
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            *(f"feed_forward.w{i}" for i in (1, 2, 3)),
        },
    ),
    "qwen3_5_text": (
        {*(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")), *_MLP},
        _ATTENTION | _MLP,
    ),
    "deepseek_v2": (
        {
            *(f"self_attn.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj")),
            *_MLP,
        },
        {
            *(f"self_attn.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj")),
            *(name.replace("mlp", "mlp.shared_experts") for name in _MLP),
            *_EXPERTS,
        },
    ),
    "qwen3_moe": (_ATTENTION | _EXPERTS, _ATTENTION | _EXPERTS),
    "gemma3": (_ATTENTION | _MLP, _ATTENTION | _MLP),
}
"""The linears that are quantized in the first and in the second decoder layer. Routers, convolutions and the
projections of decay and latent keys and values are not."""


@pytest.mark.parametrize("name", SELECTION.values(), ids=SELECTION)
def test_each_kind_of_decoder_layer_is_converted(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for action, form in (
        ("build", ORIGINAL),
        ("convert", "fast"),
        ("convert", "data-free"),
        ("dequantize", "data-free"),
    ):
        run_step(Step(action, form), case, tmp_path)
    verify(tmp_path / "fast")
    specs = check_folder(tmp_path / "fast")
    for index, expected in enumerate(QUANTIZED[name]):
        inside = [
            linear.partition(f".layers.{index}.")[2] for linear in specs if f".layers.{index}." in linear
        ]
        assert sorted(inside) == sorted(expected)
    assert len(specs) == sum(map(len, QUANTIZED[name]))

    original, dequantized = read_all(tmp_path / ORIGINAL), read_all(tmp_path / "data-free-dequantized")
    assert {key: tensor.shape for key, tensor in original.items()} == {
        key: tensor.shape for key, tensor in dequantized.items()
    }
    for key, tensor in original.items():
        if key.removesuffix(".weight") in specs:
            # The sign of a Gaussian number has a correlation of sqrt(2 / pi) = 0.8 with it.
            assert 0.75 < torch.cosine_similarity(dequantized[key].view(-1), tensor.view(-1), 0) < 1, key
        else:
            assert torch.equal(dequantized[key], tensor), key


def read_all(folder: Path) -> dict[str, Tensor]:
    entries = read_folder(folder)
    return read_tensors(folder, entries, list(entries))
