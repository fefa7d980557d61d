"""Source models with MXFP4 experts, as gpt-oss is published: dequantized, refused if blocks and scales do not fit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from any_model import KINDS, build_any_model
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.source.model import check_values, open_source
from bwla_kernels.errors import SourceError
from bwla_kernels.format.experts import expert_of
from bwla_kernels.format.folder import check_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the 4-bit floats, by their three lower bits (OCP Microscaling Formats 1.0, section 5.3.3)."""

PREFIX = "model.layers.0.mlp.experts"


def value(blocks: Tensor, scales: Tensor, expert: int, row: int, column: int) -> float:
    """Decode one weight: two values a byte, the first in the lower half."""
    byte = int(blocks[expert, row, column // 32, column % 32 // 2])
    code = byte >> 4 if column % 2 else byte & 15
    sign = -1.0 if code & 8 else 1.0
    return float(sign * E2M1[code & 7] * 2.0 ** (int(scales[expert, row, column // 32]) - 127))


def to_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Write a model whose experts are random MXFP4 weights; return all tensors of the file."""
    generator = torch.Generator().manual_seed(0)
    build_any_model(**KINDS["transposed experts with biases"]).bfloat16().save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).byte()
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape, generator=generator).byte()
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def test_experts_are_read_as_bfloat16(tmp_path: Path) -> None:
    stored = to_mxfp4(tmp_path)
    source = open_source(str(tmp_path))
    check_values(source)
    for leaf, which, stride, first in (
        ("gate_proj", "gate_up_proj", 2, 0),
        ("up_proj", "gate_up_proj", 2, 1),
        ("down_proj", "down_proj", 1, 0),
    ):
        name = f"{PREFIX}.3.{leaf}.weight"
        weight = source.read([name])[name]
        assert weight.shape == source.entries[name].shape == (64, 64)
        assert weight.dtype == source.entries[name].dtype == torch.bfloat16
        blocks, scales = stored[f"{PREFIX}.{which}_blocks"], stored[f"{PREFIX}.{which}_scales"]
        expected = [
            [value(blocks, scales, 3, stride * row + first, column) for column in range(64)]
            for row in range(64)
        ]
        assert torch.equal(weight.float(), torch.tensor(expected))
    assert not [name for name in source.entries if name.endswith(("_blocks", "_scales"))]


def test_experts_that_are_ignored_are_written_in_16_bits(tmp_path: Path) -> None:
    to_mxfp4(tmp_path)
    source = open_source(str(tmp_path), ("experts",))
    name = f"{PREFIX}.gate_up_proj"
    assert source.entries[name].shape == source.read([name])[name].shape == (4, 64, 128)


def test_a_conversion_leaves_no_trace_of_mxfp4(tmp_path: Path) -> None:
    to_mxfp4(tmp_path / "model")
    out = tmp_path / "out"
    convert(Options(str(tmp_path / "model"), out, rank=1, recipe="data-free"))
    specs = check_folder(out)
    assert {spec.bias for name, spec in specs.items() if expert_of(name) is not None} == {True}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bwla"
    names = [name for file in out.glob("*.safetensors") for name in load_file(file)]
    assert not [name for name in names if name.endswith(("_blocks", "_scales"))]


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        (
            "scales",
            lambda t: None,
            "expected model.layers.0.mlp.experts.down_proj_scales for these MXFP4 weights",
        ),
        ("scales", lambda t: t[:1], "down_proj_scales: expected uint8 [4, 64, 2], found uint8 [1, 64, 2]"),
        (
            "scales",
            lambda t: t.float(),
            "down_proj_scales: expected uint8 [4, 64, 2], found float32 [4, 64, 2]",
        ),
        (
            "blocks",
            lambda t: t[..., :8],
            "down_proj_blocks: expected shape [E, N, K / 32, 16], found [4, 64, 2, 8]",
        ),
    ],
)
def test_blocks_and_scales_that_do_not_fit(
    part: str, change: Callable[[Tensor], Tensor | None], sentence: str, tmp_path: Path
) -> None:
    tensors = to_mxfp4(tmp_path)
    name = f"{PREFIX}.down_proj_{part}"
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError) as refused:
        open_source(str(tmp_path))
    assert sentence in str(refused.value)
