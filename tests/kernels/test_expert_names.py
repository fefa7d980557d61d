"""The linears of experts: their names, the settings that match them, and the tensors that each one stores."""

import pytest
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec, tensor_specs
from bwla_kernels.format.experts import (
    expert_of,
    experts_module,
    first_expert,
    settings_name,
    stored_names,
    stored_specs,
)
from bwla_kernels.format.layer import INPUT_TRANSFORM
from bwla_kernels.format.schema import BWLAFormat, longest_suffix, parse_config

GATE = "model.layers.3.mlp.experts.12.gate_proj"
OTHERS = (
    "model.layers.3.mlp.gate_proj",
    "model.layers.3.mlp.shared_experts.gate_proj",
    "model.layers.3.mlp.my_experts.1.gate_proj",
    "model.layers.3.mlp.experts.gate_up_proj",
    "model.layers.3.mlp.experts.1.attention.q_proj",
    "model.layers.3.mlp.experts.12",
)


def test_the_number_of_an_expert_is_found() -> None:
    assert expert_of(GATE) == 12
    assert expert_of("experts.0.w1") == 0
    assert [expert_of(name) for name in OTHERS] == [None] * len(OTHERS)


def test_names_of_other_experts() -> None:
    assert settings_name(GATE) == "model.layers.3.mlp.experts.*.gate_proj"
    assert first_expert(GATE) == "model.layers.3.mlp.experts.0.gate_proj"
    assert experts_module(GATE) == "model.layers.3.mlp.experts"
    for name in OTHERS:
        assert settings_name(name) == first_expert(name) == name
        assert experts_module(name) is None


def test_only_expert_0_stores_the_input_transform() -> None:
    spec = LayerSpec(8, 64, 1, 8, 8, rank=2, planes=2)
    assert stored_specs("experts.0.w1", spec) == tensor_specs(spec) == stored_specs("mlp.w1", spec)
    assert list(stored_specs("experts.1.w1", spec)) == ["weight_packed", "weight_scale", "low_rank_b"]
    names = stored_names("experts.1.w1", spec)
    assert list(names) == list(tensor_specs(spec))
    assert {key for key, name in names.items() if name == f"experts.0.w1.{key}"} == set(INPUT_TRANSFORM)
    assert names["weight_packed"] == "experts.1.w1.weight_packed"


def test_a_star_matches_every_expert_and_nothing_else() -> None:
    table = {"down_proj": 1, "experts.*.down_proj": 2, "model.layers.3.mlp.experts.*.down_proj": 3}
    assert longest_suffix(table, "model.layers.3.mlp.down_proj") == 1
    assert longest_suffix(table, "model.layers.3.mlp.shared_experts.down_proj") == 1
    assert longest_suffix(table, "model.layers.2.mlp.experts.127.down_proj") == 2
    assert longest_suffix(table, "model.layers.3.mlp.experts.0.down_proj") == 3
    assert longest_suffix(table, "model.layers.3.mlp.experts.0.up_proj") is None
    assert longest_suffix({"down_proj": 1}, "model.layers.3.mlp.experts.0.down_proj") == 1
    assert longest_suffix({"experts.*.w1": 1, "experts.4.w1": 2}, "a.experts.4.w1") == 2
    assert longest_suffix({"3.experts.*.w1": 1, "experts.4.w1": 2}, "a.3.experts.4.w1") == 1


def test_experts_in_config_json() -> None:
    rotation = {"experts.*.w1": (1, 8, 8)}
    written = BWLAFormat(rotation=rotation, format_version=2, experts={"input_transform": "first"})
    assert written.to_json()["experts"] == {"input_transform": "first"}
    assert parse_config(written.to_json()) == written
    assert "experts" not in BWLAFormat(rotation=rotation, format_version=2).to_json()
    spec = written.layer_spec("model.layers.0.mlp.experts.5.w1", 32, 64)
    assert spec == LayerSpec(32, 64, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "one-bit experts need format_version 2, found 1"),
        ({"experts": {"input_transform": "each"}}, "experts.input_transform"),
        ({"experts": {}}, "experts.input_transform"),
        ({"experts": {"input_transform": "first", "count": 8}}, "experts.count"),
        ({"rank": {"layers.*.w1": 2}}, "'\\*' stands for the number of an expert"),
        ({"planes": {"experts.*": 2}}, "'\\*' stands for the number of an expert"),
    ],
)
def test_invalid_settings_are_refused(changes: dict, message: str) -> None:
    rotation = {"experts.*.w1": (1, 8, 8)}
    data = BWLAFormat(rotation=rotation, format_version=2, experts={"input_transform": "first"}).to_json()
    with pytest.raises(FormatError, match=message):
        parse_config({**data, **changes})
