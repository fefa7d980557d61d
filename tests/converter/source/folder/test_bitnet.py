"""BitNet checkpoints: read as transformers reads them, refused where a tensor or a setting does not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bwla_converter.source.folder.bitnet import dequantize
from bwla_converter.source.model import open_source
from bwla_kernels.errors import SourceError
from few_values import FILE, change_settings, change_tensor, few_values, write_bitnet
from safetensors.torch import load_file
from torch import Tensor

NAME = "model.layers.1.mlp.up_proj"
CLASSES = ("bitlinear", "autobitlinear")


@pytest.fixture(params=CLASSES)
def linear_class(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, linear_class: str) -> Path:
    return write_bitnet(tmp_path / "model", few_values("Llama", planes=2), linear_class)


def test_values_are_those_of_transformers_linears(folder: Path, linear_class: str) -> None:
    """What its linear computes from unit vectors, one after the other, are the columns of the weight."""
    from transformers.integrations.bitnet import AutoBitLinear, BitLinear, unpack_weights

    stored = load_file(folder / FILE)
    packed, scale = stored[f"{NAME}.weight"], stored[f"{NAME}.weight_scale"].float()
    weight = open_source(str(folder)).read([f"{NAME}.weight"])[f"{NAME}.weight"]
    rows, columns = weight.shape
    with torch.compiler.set_stance("force_eager"):
        if linear_class == "bitlinear":
            linear = BitLinear(columns, rows, bias=False, dtype=torch.float32)
            linear.weight, linear.weight_scale = packed, scale
        else:
            linear = AutoBitLinear(columns, rows, bias=False, dtype=torch.float32)
            linear.weight = torch.nn.Parameter(unpack_weights(packed, dtype=torch.float32))
            linear.weight_scale = scale
        computed = linear(torch.eye(columns)).t()
    torch.testing.assert_close(computed, weight, rtol=1e-6, atol=0)
    codes = unpack_weights(packed, dtype=torch.float32)
    assert torch.equal(weight, codes * scale if linear_class == "autobitlinear" else codes / scale)


def remove_scale(folder: Path) -> None:
    change_tensor(folder, f"{NAME}.weight_scale", None)


def several_scales(folder: Path) -> None:
    change_tensor(folder, f"{NAME}.weight_scale", torch.ones(3))


def too_few_rows(folder: Path) -> None:
    change_tensor(folder, f"{NAME}.weight", torch.zeros(64, 256, dtype=torch.uint8))


@pytest.mark.parametrize("linear_class", ["bitlinear"], indirect=True)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove_scale, r"up_proj.weight: expected weight_scale for this BitNet weight, found none"),
        (several_scales, r"up_proj.weight_scale: expected one float value, found float32 \[3\]"),
        (too_few_rows, r"up_proj.weight: expected shape \[512, 256\], found \[256, 256\]"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[Path], None], sentence: str) -> None:
    change(folder)
    with pytest.raises(SourceError, match=sentence):
        open_source(str(folder))


@pytest.mark.parametrize("linear_class", ["bitlinear"], indirect=True)
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"use_rms_norm": True}, "expected BitNet linears without a norm of their own, found use_rms_norm"),
        (
            {"quantization_mode": "online"},
            "expected BitNet weights that are stored in three values .* found online",
        ),
    ],
)
def test_settings_that_are_not_supported(folder: Path, setting: dict[str, object], sentence: str) -> None:
    change_settings(folder, setting)
    with pytest.raises(SourceError, match=sentence):
        open_source(str(folder))


def test_a_fourth_value_is_refused() -> None:
    packed: Tensor = torch.tensor([[0b01100010, 0b11000000]], dtype=torch.uint8)
    with pytest.raises(SourceError, match="values other than -1, 0 and 1"):
        dequantize(packed, torch.ones(1), "bitlinear")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("-inf"), float("nan")])
def test_a_scale_that_is_not_positive_is_refused(value: float) -> None:
    with pytest.raises(SourceError, match="expected a positive, finite weight_scale, found"):
        dequantize(torch.zeros(1, 4, dtype=torch.uint8), torch.tensor([value]), "bitlinear")


@pytest.mark.parametrize("linear_class", ["bitlinear"], indirect=True)
def test_the_weight_with_a_fourth_value_is_named(folder: Path) -> None:
    change_tensor(folder, f"{NAME}.weight", torch.full((128, 256), 255, dtype=torch.uint8))
    with pytest.raises(SourceError, match=rf"{NAME}.weight: a BitNet weight has values other"):
        open_source(str(folder)).read([f"{NAME}.weight"])
