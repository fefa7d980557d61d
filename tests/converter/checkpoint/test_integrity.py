"""Hashes detect every change of files that loaders read, and only report changes of files that users may edit."""

import json
from pathlib import Path

import pytest
from bwla_converter.checkpoint.integrity import HASHES_FILE, check_hashes, update_hash, write_hashes
from bwla_kernels.errors import FormatError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "model-1.safetensors", "README.md", "bwla_report.json"):
        (tmp_path / name).write_text(f"contents of {name}")
    write_hashes(tmp_path)
    return tmp_path


def test_an_untouched_folder_is_intact(folder: Path) -> None:
    verdict = check_hashes(folder)
    assert verdict is not None
    assert verdict.intact
    assert verdict.checked == ["README.md", "config.json", "model-1.safetensors"]
    assert str(verdict).startswith("intact: 3 files")


def test_the_hashes_of_equal_files_are_equal_bytes(folder: Path) -> None:
    before = (folder / HASHES_FILE).read_bytes()
    (folder / "bwla_report.json").write_text("another time")
    write_hashes(folder)
    assert (folder / HASHES_FILE).read_bytes() == before


def test_one_flipped_bit_is_noticed(folder: Path) -> None:
    data = bytearray((folder / "model-1.safetensors").read_bytes())
    data[3] ^= 1
    (folder / "model-1.safetensors").write_bytes(data)
    verdict = check_hashes(folder)
    assert verdict is not None
    assert (verdict.intact, verdict.changed) == (False, ["model-1.safetensors"])
    assert "changed: model-1.safetensors" in str(verdict)


def test_a_missing_file_is_noticed(folder: Path) -> None:
    (folder / "config.json").unlink()
    verdict = check_hashes(folder)
    assert verdict is not None
    assert (verdict.intact, verdict.missing) == (False, ["config.json"])


@pytest.mark.parametrize(
    ("name", "intact"), [("notes.txt", True), ("model.safetensors", False), ("m.py", False)]
)
def test_added_files_count_where_loaders_read_them(folder: Path, name: str, intact: bool) -> None:
    (folder / name).write_text("new")
    verdict = check_hashes(folder)
    assert verdict is not None
    assert (verdict.intact, verdict.added) == (intact, [name])


def test_an_edited_card_is_reported_but_is_not_damage(folder: Path) -> None:
    (folder / "README.md").write_text("my own words")
    verdict = check_hashes(folder)
    assert verdict is not None
    assert verdict.intact
    assert "edited: README.md" in str(verdict)
    update_hash(folder, "README.md")
    verdict = check_hashes(folder)
    assert verdict is not None
    assert verdict.edited == []


def test_a_folder_without_hashes_has_no_verdict(folder: Path) -> None:
    (folder / HASHES_FILE).unlink()
    assert check_hashes(folder) is None
    update_hash(folder, "README.md")
    assert not (folder / HASHES_FILE).exists()


@pytest.mark.parametrize(
    "data",
    [{"version": 2, "files": {}}, {"version": 1}, *({"version": 1, "files": {"a": bad}} for bad in (3, {}))],
)
def test_damaged_hashes_raise(folder: Path, data: dict) -> None:
    (folder / HASHES_FILE).write_text(json.dumps(data))
    with pytest.raises(FormatError, match=r"bwla_hashes\.json: expected version 1"):
        check_hashes(folder)
