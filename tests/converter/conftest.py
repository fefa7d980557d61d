"""Settings for all tests of the converter, and editors for the files of a model."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.quantize import data_free
from safetensors.torch import load_file, save_file

# On GitHub Actions typer colors its output even if it is captured.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: for tiny tensors a second one only costs time, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def few_rounds() -> Iterator[None]:
    """The real steps of recipe `data-free`, with fewer rounds."""
    options = data_free.DataFreeOptions(okt_rounds=2, psp_rounds=2, scale_rounds=2)
    plain = data_free.quantize_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            data_free, "quantize_group", lambda *args, **more: plain(*args, **{**more, "options": options})
        )
        yield


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None deletes a key."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data.pop(key, None) if value is None else data.update({key: value})
    path.write_text(json.dumps(data))


def edit_tensor(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace (or, for None, delete) one tensor of a safetensors file."""
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def edit() -> Any:
    """Return the two functions above as `edit.json(...)` and `edit.tensor(...)`."""

    class Editors:
        json = staticmethod(edit_json)
        tensor = staticmethod(edit_tensor)

    return Editors


@pytest.fixture
def make_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return `make_gguf("Qwen3", name="model", **options of write_gguf)`, which writes a tiny model's GGUF file.

    The folders of such files are in `tmp_path / "cache" / "gguf"`.
    """
    from gguf_models import tiny, write_gguf

    monkeypatch.setenv("BWLA_CACHE", str(tmp_path / "cache"))

    def make(family: str = "Qwen3", name: str = "model", **options: Any) -> Path:
        return write_gguf(tmp_path / f"{name}.gguf", tiny(family), **options)

    return make
