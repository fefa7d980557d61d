"""Source models with fp8 weights: dequantized in every layout, refused if a scale does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.source.folder.fp8 import dequantize
from bwla_converter.source.model import check_values, open_source
from bwla_kernels.errors import SourceError
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = (48, 32)
"""Does not divide all of the tiny sizes, so that the last scale blocks are smaller."""


def per_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize with one scale per block, in a plain loop over the blocks."""
    rows, columns = weight.shape
    down, across = -(-rows // BLOCK[0]), -(-columns // BLOCK[1])
    scale = torch.zeros(down, across)
    code = torch.zeros_like(weight)
    for i in range(down):
        for j in range(across):
            cell = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            scale[i, j] = weight[cell].abs().max() / 448
            code[cell] = weight[cell] / scale[i, j]
    return code.to(torch.float8_e4m3fn), scale


def per_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


def per_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn), scale


LAYOUTS: dict[str, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], str, dict[str, Any]]] = {
    "block": (per_block, "weight_scale_inv", {"quant_method": "fp8", "weight_block_size": list(BLOCK)}),
    "row": (per_row, "weight_scale", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "tensor": (per_tensor, "weight_scale", {"quant_method": "fp8"}),
}


def to_fp8(folder: Path, layout: str) -> dict[str, Tensor]:
    """Quantize the linears of a model to fp8 and return their original weights."""
    make, key, config = LAYOUTS[layout]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    before = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        before[name] = tensors[name].float()
        tensors[name], scale = make(before[name])
        tensors[name.removesuffix("weight") + key] = scale
        tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.5)
    save_file(tensors, path, metadata={"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, "quantization_config": config}))
    return before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_read_as_bfloat16_close_to_the_originals(make_model, layout: str) -> None:
    folder = make_model(dtype=torch.float32, num_attention_heads=3, num_key_value_heads=1)
    before = to_fp8(folder, layout)
    source = open_source(str(folder))
    check_values(source)
    assert source.entries.keys() == before.keys() | {
        name for name in source.entries if not name.endswith("_proj.weight")
    }
    for name, weight in before.items():
        dequantized = source.read([name])[name]
        assert dequantized.dtype == source.entries[name].dtype == torch.bfloat16
        # Three bits of mantissa: a sixteenth of each value, or of the smallest normal number of its scale block.
        bound = weight.abs() * 2**-4 + weight.abs().max() / 448 * 2**-6
        assert ((dequantized.float() - weight).abs() <= bound * 1.01).all()


def test_dequantization_is_code_times_scale() -> None:
    code = torch.tensor([[1.0, -2.0, 4.0], [0.5, 3.0, -6.0], [8.0, 1.5, 0.25]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 3.0], [0.5, 4.0]])
    expected = torch.tensor([[2.0, -4.0, 12.0], [1.0, 6.0, -18.0], [4.0, 0.75, 1.0]])
    assert torch.equal(dequantize(code, scale, (2, 2)).float(), expected)
    assert torch.equal(dequantize(code, torch.tensor(2.0), None).float(), 2 * code.float())
    rows = torch.tensor([1.0, 2.0, 4.0])
    assert torch.equal(dequantize(code, rows, (2, 2)).float(), rows[:, None] * code.float())


def test_a_conversion_leaves_no_trace_of_fp8(make_model, tmp_path: Path) -> None:
    folder, out = make_model(), tmp_path / "out"
    to_fp8(folder, "block")
    convert(Options(str(folder), out, rank=1, ignore=("re:.*layers.1.mlp.*",), recipe="data-free"))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bwla"
    tensors = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert not [name for name in tensors if name.endswith(("scale_inv", "input_scale"))]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: None, "expected weight_scale_inv or weight_scale for this fp8 weight, found neither"),
        (lambda t: t[:1], "expected one scale, one per row, or one per block of [48, 32], for a weight"),
        (lambda t: t.to(torch.int32), "weight_scale_inv: expected a float dtype, found torch.int32"),
        (lambda t: t * float("nan"), "up_proj.weight: expected finite values, found NaN"),
    ],
)
def test_scales_that_do_not_fit(make_model, edit, change, sentence: str) -> None:
    folder = make_model()
    to_fp8(folder, "block")
    edit.tensor(folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight_scale_inv", change)
    with pytest.raises(SourceError) as error:
        check_values(open_source(str(folder)))
    assert sentence in str(error.value)
