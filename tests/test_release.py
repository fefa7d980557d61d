"""What a release must fulfil before it is published: its tag, its changelog, and the names of its files."""

from pathlib import Path

import pytest
import repository  # noqa: F401

from scripts.check_release import ReleaseError, check_files, notes_of, version_of

CHANGELOG = """# Changelog

## Unreleased

## 0.2.0 - 2026-12-01

- Faster.

### For developers

- Smaller.

## 0.1.0 - 2026-11-01
"""
WHEEL = "bwla-0.2.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl"


@pytest.mark.parametrize("version", ["0.2.0", "1.10.3", "0.2.0rc1", "0.2.0b2"])
def test_tags_are_versions(version: str) -> None:
    assert version_of(f"v{version}") == version


@pytest.mark.parametrize("tag", ["0.2.0", "v0.2", "v0.2.0-rc1", "v0.2.0.dev1", "version", "v0.2.0+local"])
def test_other_tags_are_refused(tag: str) -> None:
    with pytest.raises(ReleaseError, match="expected a tag such as v0.2.0"):
        version_of(tag)


def test_the_notes_are_the_section_of_the_version() -> None:
    assert notes_of("0.2.0", CHANGELOG) == "- Faster.\n\n### For developers\n\n- Smaller.\n"


@pytest.mark.parametrize(
    ("version", "said"), [("0.1.0", "is empty"), ("0.2.1", "expected a heading"), ("0.2", "expected")]
)
def test_a_missing_section_is_refused(version: str, said: str) -> None:
    with pytest.raises(ReleaseError, match=said):
        notes_of(version, CHANGELOG)


@pytest.mark.parametrize(
    ("names", "ok"),
    [
        (["bwla-0.2.0.tar.gz", WHEEL], True),
        (["bwla-0.2.0.tar.gz"], False),
        ([WHEEL], False),
        (["bwla-0.2.0.tar.gz", "bwla-0.2.0-py3-none-linux_x86_64.whl"], False),
        (["bwla-0.2.1.dev0+g1a2b3c4.tar.gz", WHEEL], False),
        (["bwla-0.2.0.tar.gz", WHEEL, "notes.md"], False),
        ([], False),
    ],
)
def test_the_files_are_those_of_the_version(names: list[str], ok: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    if ok:
        check_files("0.2.0", tmp_path)
    else:
        with pytest.raises(ReleaseError, match="expected bwla-0.2.0.tar.gz and wheels"):
            check_files("0.2.0", tmp_path)
