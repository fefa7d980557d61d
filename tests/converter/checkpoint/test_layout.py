"""Layout of the output: names of the parts, free disk space, config.json."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bwla_converter.checkpoint import layout
from bwla_converter.checkpoint.layout import Parts, check_space, int8_tensors, output_config
from bwla_converter.checkpoint.writer import OutputError
from bwla_kernels.format.files import Entry
from bwla_kernels.format.schema import BWLAFormat, parse_config


def source_with(sizes: dict[str, int], num_layers: int = 2) -> SimpleNamespace:
    """A source whose tensors outside the decoder layers have these sizes in bytes."""
    entries = {name: Entry("", (size // 2,), torch.bfloat16) for name, size in sizes.items()}
    return SimpleNamespace(num_layers=num_layers, entries=entries, names_outside_layers=lambda: list(entries))


def test_every_layer_has_a_file_and_the_rest_is_split_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PART_BYTES", 100)
    parts = Parts(source_with({"a": 60, "b": 40, "c": 2, "large": 300, "d": 10}))
    assert [parts.layer_file(index) for index in range(2)] == [
        "part-00001.safetensors",
        "part-00002.safetensors",
    ]
    assert parts.rest() == [
        ("part-00003.safetensors", ["a", "b"]),
        ("part-00004.safetensors", ["c"]),
        ("part-00005.safetensors", ["large"]),
        ("part-00006.safetensors", ["d"]),
    ]


def test_too_little_disk_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_020_000_000))
    check_space(tmp_path / "out", 1_000_000_000)
    with pytest.raises(OutputError, match=r"out: expected 1\.01 GB of free disk space, found 1\.02 GB"):
        check_space(tmp_path / "out", 1_010_000_000)


@pytest.mark.parametrize("head_source", [None, "model.embed_tokens.weight"])
def test_an_8_bit_head_is_not_tied_to_the_embeddings(head_source: str | None) -> None:
    settings = {"tie_word_embeddings": True, "hidden_size": 8}
    source = SimpleNamespace(config=dict(settings), tied={}, defaults={**settings, "head_dim": 4})
    plan = SimpleNamespace(head_source=head_source, format=BWLAFormat(rotation={}))
    config = output_config(source, plan, {"model.norm.weight": Entry("", (8,), torch.bfloat16)})
    tied = head_source is None
    assert config["tie_word_embeddings"] is tied
    described = parse_config(config["quantization_config"])
    assert described.config == {"head_dim": 4, "hidden_size": 8, "tie_word_embeddings": tied}
    assert described.tensors == {"model.norm.weight": "bfloat16 [8]"}
    assert source.config == settings


def test_8_bit_tensors_have_their_stored_names_and_come_from_their_source() -> None:
    plan = SimpleNamespace(int8_sources={"lm_head": "lm_head.weight", "model.embed_tokens": "wte"})
    weight = torch.randn(16, 8)
    for name, module in (("lm_head.weight", "lm_head"), ("wte", "model.embed_tokens")):
        tensors = int8_tensors(plan, name, {name: weight}.__getitem__)
        assert tensors.keys() == {f"{module}.weight_int8", f"{module}.weight_scale"}
        assert torch.equal(tensors[f"{module}.weight_scale"], weight.abs().amax(1) / 127)
    assert int8_tensors(plan, "model.norm.weight", {}.__getitem__) == {}
