"""Headers of GGUF files and the values of their tensors; every file that is no model is refused with a sentence."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from bwla_converter.source import gguf_file
from bwla_converter.source.gguf_file import open_gguf
from bwla_converter.source.gguf_folder import write_folder
from bwla_converter.source.gguf_models.reorder import subtract_one
from bwla_converter.source.gguf_path import is_gguf
from bwla_kernels.errors import SourceError
from gguf import GGMLQuantizationType as Type
from gguf_models import finish

READ = [name for name in Type.__members__ if name not in ("Q8_1", "Q8_K", "F64", "Q1_0")]
READ = [name for name in READ if not name.startswith("I") or name.startswith("IQ")]


def refused(file: Path, *sentences: str) -> None:
    with pytest.raises(SourceError) as error:
        open_gguf(file)
    for sentence in sentences:
        assert sentence in str(error.value)


def write(
    path: Path, tensors: dict[str, tuple[np.ndarray, Type]], prepare: Callable[[gguf.GGUFWriter], None] = id
) -> Path:
    """Write a file with tensors in these types."""
    writer = gguf.GGUFWriter(path, "llama")
    prepare(writer)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    finish(writer)
    return path


def random_rows(kind: Type, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Return bytes of a tensor whose values are all finite: every byte of a block is below 0x3C."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(seed).integers(0, 0x3C, (rows, blocks * size), dtype=np.uint8)


@pytest.mark.parametrize("chunk", [1, 1000, 2**22])
@pytest.mark.parametrize("kind", READ)
def test_values_are_those_of_gguf_rounded_to_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
) -> None:
    monkeypatch.setattr(gguf_file, "CHUNK", chunk)
    raw = random_rows(Type[kind], 37, 2 if kind not in ("F32", "F16", "BF16") else 64)
    if kind in ("F32", "F16"):
        raw = raw.view({"F32": np.float32, "F16": np.float16}[kind])
    file = open_gguf(write(tmp_path / "model.gguf", {"token_embd.weight": (raw, Type[kind])}))
    expected = torch.from_numpy(gguf.quants.dequantize(raw, Type[kind]).copy())
    found = file.read("token_embd.weight")
    assert found.shape == file.shape("token_embd.weight") == expected.shape
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(
        subtract_one(file.read("token_embd.weight", dtype=torch.float32), None).bfloat16(),
        (expected - 1).bfloat16(),
    )
    assert expected.isfinite().all()


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "F64", "I32"])
def test_types_that_cannot_be_dequantized(tmp_path: Path, kind: str) -> None:
    raw = np.zeros((2, gguf.GGML_QUANT_SIZES[Type[kind]][1] * 4), np.uint8)
    raw = raw.view({"F64": np.float64, "I32": np.int32}.get(kind, np.uint8))
    file = write(tmp_path / "model.gguf", {"blk.0.attn_q.weight": (raw, Type[kind])})
    refused(file, f"blk.0.attn_q.weight has type {kind}, which gguf", "cannot dequantize: use a newer gguf")


def test_a_type_that_gguf_does_not_know(make_gguf) -> None:
    file = make_gguf()
    name = b"blk.0.attn_q.weight"
    raw = bytearray(file.read_bytes())
    start = raw.index(name) + len(name) + 4 + 16  # number of dimensions, and two dimensions
    raw[start : start + 4] = (7777).to_bytes(4, "little")
    file.write_bytes(raw)
    refused(file, "cannot read this file (7777 is not a valid GGMLQuantizationType)", "it needs a newer gguf")


def test_a_file_with_another_suffix_is_recognized(make_gguf, tmp_path: Path) -> None:
    file = make_gguf().rename(tmp_path / "blob")
    assert is_gguf(file)
    assert open_gguf(file).architecture == "qwen3"
    assert not is_gguf(tmp_path)
    assert not is_gguf(Path("owner/name"))


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "model.gguf", "model.gguf: there is no such file")


@pytest.mark.parametrize("contents", [b"", b"GGU", b"PK\3\4 and more of it"])
def test_other_contents(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(contents)
    refused(tmp_path / "model.gguf", "expected a GGUF file, found other contents")


def test_every_truncation_is_noticed(make_gguf) -> None:
    file = make_gguf()
    raw = file.read_bytes()
    for size in [*range(8, 3000, 41), *range(3000, len(raw), 4999), len(raw) - 64]:
        file.write_bytes(raw[:size])
        refused(file, "model.gguf: gguf ", "cannot read this file", "it is incomplete, so download it again")


def test_a_big_endian_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    finish(writer)
    refused(tmp_path / "model.gguf", "is a big-endian GGUF file")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("adapter", "is an adapter (LoRA), not a model"),
        ("mmproj", "is the vision or audio encoder of a multimodal model"),
        ("imatrix", "is an importance matrix"),
        ("vocab", "is a vocabulary without weights"),
    ],
)
def test_files_that_are_no_language_models(make_gguf, kind: str, sentence: str) -> None:
    refused(make_gguf(extra=lambda writer: writer.add_type(kind)), sentence)


def test_an_old_encoder_file_without_a_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "clip")
    writer.add_tensor("v.patch_embd.weight", np.zeros((96, 64), np.float32))
    finish(writer)
    refused(tmp_path / "model.gguf", "is the vision or audio encoder of a multimodal model")


def test_a_vocabulary_without_a_type(tmp_path: Path) -> None:
    refused(write(tmp_path / "model.gguf", {}), "is a vocabulary without weights")


def test_the_parts_of_a_split_model_give_the_same_folder(make_gguf, tmp_path: Path) -> None:
    write_folder(make_gguf("Llama", name="model"), tmp_path / "whole")
    first = make_gguf("Llama", name="split", parts=3)
    assert len(list(tmp_path.glob("split-*"))) == 3
    write_folder(first, tmp_path / "parts")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in set(names) - {"README.md"}:
        if name.endswith(".safetensors"):
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_parts_of_a_split_model_that_are_missing_or_mixed_up(make_gguf) -> None:
    first = make_gguf(name="split", parts=3)
    second, third = (first.with_name(f"split-0000{number}-of-00003.gguf") for number in (2, 3))
    refused(second, "is part 2 of a split model: give the first part, split-00001-of-00003.gguf")
    third.rename(first.with_name("aside"))
    refused(first, "split-00003-of-00003.gguf: there is no such file")
    third.write_bytes(second.read_bytes())
    refused(first, "is part 2 of 3 by its metadata, but part 3 of 3 by its name")
    refused(first.rename(first.with_name("model.gguf")), "is part 1 of 3 by its metadata, but part 1 of 1")
