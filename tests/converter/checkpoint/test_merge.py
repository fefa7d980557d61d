"""Parts of a checkpoint merged into files of the usual size."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bwla_converter.checkpoint import merge
from bwla_converter.checkpoint.merge import group_parts, merge_files, part_name, shard_name
from bwla_converter.checkpoint.writer import CheckpointWriter
from bwla_kernels.format.files import INDEX_FILE, read_folder, read_tensors
from safetensors.torch import load_file, save_file

PARTS = [
    {"a": torch.arange(3, dtype=torch.uint8), "b": torch.arange(3).bfloat16()},
    {"c": torch.arange(4, dtype=torch.float64).view(2, 2), "d": torch.tensor(7, dtype=torch.int32)},
    {"e": torch.zeros(0, 4), "f": torch.arange(5).to(torch.float8_e4m3fn), "é": torch.ones(1)},
]


def write_parts(folder: Path) -> CheckpointWriter:
    writer = CheckpointWriter(folder)
    for index, tensors in enumerate(PARTS):
        writer.write_shard(part_name(index), tensors)
    (folder / "source").mkdir()
    writer.finish(folder / "source", {"model_type": "none"})
    return writer


def check(folder: Path) -> None:
    entries = read_folder(folder)
    expected = {name: tensor for part in PARTS for name, tensor in part.items()}
    assert entries.keys() == expected.keys()
    for name, tensor in read_tensors(folder, entries, list(entries)).items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.float(), expected[name].float())


def test_merged_tensors_are_the_same_and_aligned(tmp_path: Path) -> None:
    for index, tensors in enumerate(PARTS):
        save_file(tensors, tmp_path / part_name(index))
    merge_files([tmp_path / part_name(index) for index in range(3)], tmp_path / "all")
    expected = {name: tensor for part in PARTS for name, tensor in part.items()}
    found = load_file(tmp_path / "all")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), expected[name].float()) for name in expected)
    data = (tmp_path / "all").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        assert entry["data_offsets"][0] % expected[name].element_size() == 0, name


def test_a_damaged_part_is_noticed(tmp_path: Path) -> None:
    save_file(PARTS[0], tmp_path / "part")
    (tmp_path / "part").write_bytes((tmp_path / "part").read_bytes()[:-1])
    with pytest.raises(OSError, match="expected 1 more bytes, found the end of the file"):
        merge_files([tmp_path / "part"], tmp_path / "all")
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_parts_are_grouped_in_order_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "MAX_FILE_BYTES", 100)
    sizes = {"p1": 60, "p2": 40, "p3": 1, "p4": 300, "p5": 99, "p6": 1}
    groups = group_parts(sizes)
    assert groups == [["p1", "p2"], ["p3"], ["p4"], ["p5", "p6"]]
    for done in range(len(groups)):
        left = {name: sizes[name] for group in groups[done:] for name in group}
        assert group_parts(left) == groups[done:]
    assert group_parts({}) == []


def test_files_are_named_as_transformers_names_them() -> None:
    assert shard_name(0, 1) == "model.safetensors"
    assert shard_name(1, 12) == "model-00002-of-00012.safetensors"


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    writer = write_parts(tmp_path)
    assert (tmp_path / INDEX_FILE).is_file()
    check(tmp_path)
    writer.merge_parts()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "source"]
    assert writer.digests.keys() == {"model.safetensors"}
    check(tmp_path)
    writer.merge_parts()
    check(tmp_path)


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_interrupted_merge_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(merge, "MAX_FILE_BYTES", 1)
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    for path in (whole, folder):
        path.mkdir()
    write_parts(whole).merge_parts()
    recorded: list[dict[str, str]] = []

    def stop_after(digests: dict[str, str]) -> None:
        recorded.append(dict(digests))
        if len(recorded) > stop:
            raise KeyboardInterrupt

    interrupt: Callable[[dict[str, str]], None] = stop_after
    with pytest.raises(KeyboardInterrupt):
        write_parts(folder).merge_parts(interrupt)
    again = CheckpointWriter(folder)
    for file, digest in recorded[-1].items():
        again.adopt_shard(file, digest)
    again.merge_parts()
    for path in folder.glob("part-*"):  # those that were merged before the interruption
        path.unlink()
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    assert all(
        (whole / name).read_bytes() == (folder / name).read_bytes() for name in names if name != "source"
    )
    check(folder)
