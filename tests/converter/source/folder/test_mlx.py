"""MLX weights of one and two bits: read by its rule, refused where a tensor or a setting does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.source.folder.mlx import dequantize
from bwla_converter.source.model import open_source
from bwla_kernels.errors import SourceError
from few_values import change_settings, change_tensor, few_values, write_mlx
from random_tensors import make_generator, normal

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_mlx(tmp_path / "model", few_values(), 1, 128)


@pytest.mark.parametrize("bits", [1, 2])
def test_values_follow_mlxs_rule(bits: int) -> None:
    """A word holds the codes of neighbouring columns, the first in its lowest bits."""
    rows, columns, size = 3, 256, 64
    packed = torch.randint(0, 2**32, (rows, columns * bits // 32), generator=make_generator()).to(
        torch.uint32
    )
    scales, biases = normal(rows, columns // size).half(), normal(rows, columns // size, seed=2).half()
    weight = dequantize(packed, scales, biases, bits)
    assert (weight.dtype, weight.shape) == (torch.float16, (rows, columns))
    for row, column in [(0, 0), (1, 33), (2, 255), (0, 64)]:
        word = int(packed[row, column * bits // 32])
        code = word >> (column * bits % 32) & (2**bits - 1)
        group = column // size
        exact = code * scales[row, group].double() + biases[row, group].double()
        assert weight[row, column] == exact.half()


def test_a_model_is_read_in_the_dtype_of_its_scales(folder: Path) -> None:
    source = open_source(str(folder))
    for name in (f"{NAME}.weight", "model.embed_tokens.weight"):
        weight = source.read([name])[name]
        assert (weight.dtype, weight.shape) == (torch.float16, source.entries[name].shape)
        assert len(weight[0, :128].unique()) == 2
    assert not [name for name in source.entries if name.endswith(("scales", "biases"))]


def remove_biases(folder: Path) -> None:
    change_tensor(folder, f"{NAME}.biases", None)


def other_groups(folder: Path) -> None:
    change_tensor(folder, f"{NAME}.scales", torch.ones(512, 3).half())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove_biases, r"up_proj.weight: expected scales and biases for this MLX weight, found none"),
        (other_groups, r"up_proj.scales: expected float values \[512, 2\], found float16 \[512, 3\]"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[Path], None], sentence: str) -> None:
    change(folder)
    with pytest.raises(SourceError, match=sentence):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (
            {"bits": 4},
            "expected an unquantized model or MLX weights of 1 or 2 bits, found 4 bits in groups of 128",
        ),
        ({"mode": "mxfp4"}, "found 1 bits in groups of 128, mode mxfp4"),
        ({"lm_head": {"bits": 4}}, "expected the same bits for all MLX weights, found settings for lm_head"),
    ],
)
def test_settings_that_are_not_supported(folder: Path, setting: dict[str, Any], sentence: str) -> None:
    change_settings(folder, setting)
    with pytest.raises(SourceError, match=sentence):
        open_source(str(folder))
