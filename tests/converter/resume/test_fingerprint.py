"""Fingerprints notice what can change a conversion's bytes, and nothing else."""

import os
from pathlib import Path

import pytest
import torch
from bwla_converter.resume.fingerprint import changed_file, code_version, machine, mark_files, source_files
from bwla_converter.source.model import Source, open_source


@pytest.fixture
def source(make_model) -> Source:
    folder = make_model(shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not read")
    return open_source(str(folder))


def test_all_files_that_are_read_or_copied_are_marked(source: Source) -> None:
    names = {path.name for path in source_files(source)}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) == 3
    assert "notes.txt" not in names
    assert mark_files(source).keys() == names


def test_changed_added_and_removed_files_are_noticed(source: Source) -> None:
    before, folder = mark_files(source), source.folder
    assert changed_file(source, before) is None
    (folder / "notes.txt").write_text("changed")
    assert changed_file(source, before) is None
    (folder / "tokenizer.json").write_text("[]")
    os.utime(folder / "tokenizer.json", ns=(0, 0))
    assert changed_file(source, before) == "tokenizer.json"
    (folder / "tokenizer.json").unlink()
    assert changed_file(source, before) == "tokenizer.json"
    (folder / "tokenizer.json").write_text("{}")
    assert changed_file(source, before) is None
    (folder / "merges.txt").touch()
    assert changed_file(source, before) == "merges.txt"


def test_code_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"bwla", "torch", "sources"} <= code_version().keys()
    assert len(code_version()["sources"]) == 64
    before = machine(torch.device("cpu"))
    assert before == machine(torch.device("cpu"))
    assert "accelerator" not in before
    monkeypatch.setenv("BWLA_CPU_ISA", "avx2")
    assert machine(torch.device("cpu")) == {**before, "kernels": "avx2"}


def test_another_folder_with_the_same_files_is_unchanged(source: Source, tmp_path: Path) -> None:
    before = mark_files(source)
    source.folder.rename(tmp_path / "moved")
    assert changed_file(open_source(str(tmp_path / "moved")), before) is None
