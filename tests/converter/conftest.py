"""One thread, and editors for the files of a model."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits for the first, longer still where other work runs beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None deletes one."""
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
    """The two editors above, as `edit.json(...)` and `edit.tensor(...)`."""

    class Editors:
        json = staticmethod(edit_json)
        tensor = staticmethod(edit_tensor)

    return Editors
