"""A factory of tiny models in GGUF files, and a cache of its own for every test."""

from collections.abc import Callable
from pathlib import Path

import pytest
from bwla_converter.source.gguf_path import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that `BWLA_CACHE` names, which does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Return `make_gguf("Qwen3", name="model", **options of write_gguf)`, which writes a tiny model's GGUF file."""
    from gguf_models import tiny, write_gguf

    def make(family: str = "Qwen3", name: str = "model", **options: object) -> Path:
        return write_gguf(tmp_path / f"{name}.gguf", tiny(family), **options)

    return make
