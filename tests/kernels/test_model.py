"""What config.json must say of the model: which values are recorded, and how they are compared."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bwla_kernels.format.files import Entry, read_folder
from bwla_kernels.format.model import changed_size, config_problem, config_values, tied_conflict
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["A"],
    "model_type": "a",
    "hidden_act": "silu",
    "hidden_size": 64,
    "num_key_value_heads": None,
    "layer_types": ["conv", "attention"],
    "tie_word_embeddings": False,
    "vision_config": {"depth": 2, "image_token_id": 3},
    "quantization_config": {"rank": 1, "inner_config": {"hidden_size": 1}},
}
RECORDED = {
    "architectures": ["A"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "layer_types": ["conv", "attention"],
    "model_type": "a",
    "tie_word_embeddings": False,
    "vision_config.depth": 2,
}
PATH = Path("config.json")


def test_sizes_switches_and_kinds_are_recorded() -> None:
    assert config_values(CONFIG) == RECORDED


def test_defaults_are_recorded_where_config_json_says_nothing() -> None:
    defaults = {
        **CONFIG,
        "hidden_size": 1,
        "head_dim": 16,
        "num_key_value_heads": 4,
        "vision_config": {"num_heads": 2},
    }
    assert config_values(CONFIG, defaults) == {**RECORDED, "head_dim": 16, "vision_config.num_heads": 2}


@pytest.mark.parametrize(
    "key",
    [
        "max_position_embeddings", "sliding_window", "sliding_window_size", "max_window_layers", "eos_token_id",
        "num_experts_per_tok", "chunk_size", "rope_theta", "use_cache", "dtype", "num_labels", "transformers_version",
    ],
)  # fmt: skip
def test_what_users_may_change_is_not_recorded(key: str) -> None:
    values = (1, True, "x", [1, 2], ["x", "y"], {"hidden_size": 1}, None, 0.5)
    assert not any(config_values({key: value}) for value in values)


def test_layers_of_one_kind_say_nothing() -> None:
    assert config_values({"layer_types": ["full_attention"] * 3, "intermediate_size": [4, 4]}) == {
        "intermediate_size": [4, 4]
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": 32}, "expected hidden_size 64, as when the tensors were written, found 32: restore"),
        ({"hidden_size": 64.0}, "expected hidden_size 64, .* found 64.0"),
        ({"hidden_size": None}, "expected hidden_size 64, .* found None"),
        ({"tie_word_embeddings": 0}, "expected tie_word_embeddings False, .* found 0"),
        ({"vision_config": {"depth": 3}}, r"expected vision_config.depth 2, .* found 3"),
        ({"layer_types": ["attention", "conv"]}, "expected layer_types"),
    ],
)
def test_a_changed_value_is_named(change: dict[str, Any], problem: str) -> None:
    assert config_problem(RECORDED, CONFIG, PATH) is None
    found = config_problem(RECORDED, {**CONFIG, **change}, PATH)
    assert found is not None
    assert found.startswith("config.json: ")
    with pytest.raises(ValueError, match=problem):
        raise ValueError(found)


@pytest.mark.parametrize(
    "change", [{"vision_config": 7}, {"vision_config": {}}, {"max_position_embeddings": 7}]
)
def test_what_is_not_there_or_not_recorded_is_no_problem(change: dict[str, Any]) -> None:
    without = {key: value for key, value in CONFIG.items() if key != "hidden_size"}
    assert config_problem(RECORDED, {**without, **change}, PATH) is None


def test_sizes_of_a_loaded_config() -> None:
    vision = SimpleNamespace(depth=2)
    assert changed_size(RECORDED, SimpleNamespace(hidden_size=64, vision_config=vision)) is None
    assert changed_size(RECORDED, SimpleNamespace(hidden_size=[64], model_type="b")) is None
    assert changed_size(RECORDED, SimpleNamespace(hidden_size=32)) == ("hidden_size", 64, 32)
    vision.depth = 1
    assert changed_size(RECORDED, SimpleNamespace(vision_config=vision)) == ("vision_config.depth", 2, 1)


def test_tied_tensors_with_other_values(tmp_path: Path) -> None:
    tied = {"head.weight": "embed.weight", "absent.weight": "embed.weight"}
    for other, conflict in ((torch.ones(4), None), (torch.zeros(4), "head.weight differs from embed.weight")):
        save_file({"head.weight": torch.ones(4), "embed.weight": other}, tmp_path / "model.safetensors")
        entries: dict[str, Entry] = read_folder(tmp_path)
        found = tied_conflict(tmp_path, entries, tied)
        assert (found is None) is (conflict is None)
        assert (found or "").startswith(conflict or "")
