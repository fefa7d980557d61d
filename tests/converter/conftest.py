"""Tiny random models of every supported family, written as Hugging Face folders."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.families import FAMILIES
from safetensors.torch import load_file, save_file

ModelFactory = Callable[..., Path]

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits for the first, longer still where other work runs beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model(tmp_path: Path) -> ModelFactory:
    """`make_model("Qwen3", shards=1, dtype=..., **config)` -> folder of a random model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(
        family: str = "Qwen3", name: str = "model", shards: int = 1, dtype=torch.bfloat16, **config: Any
    ) -> Path:
        architecture = next(entry.architecture for entry in FAMILIES if entry.name == family)
        torch.manual_seed(0)
        settings = AutoConfig.for_model(family.lower(), **{**SIZES, **config}, architectures=[architecture])
        model = AutoModelForCausalLM.from_config(settings).to(dtype)
        # Biases start at zero; random ones would not survive being dropped unseen.
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_()
        folder = tmp_path / name
        largest = max(p.numel() * p.element_size() for p in model.parameters())
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(folder, max_shard_size=max(largest, total // shards) if shards > 1 else "1GB")
        return folder

    return make


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
