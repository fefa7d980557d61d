"""The list of stored tensors: compact, exact, and compared with the headers."""

import itertools
from pathlib import Path

import pytest
import torch
from bwla_kernels.format.files import Entry
from bwla_kernels.format.tensors import (
    ListedTensors,
    describe_tensors,
    listed_problems,
    parse_tensors,
    tied_tensors,
)

FOLDER = Path("model")


def entry(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Entry:
    return Entry("a.safetensors", shape, dtype)


def expand(tensors: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every listed tensor by name; each may be listed once."""
    names = [(name, item) for item in parse_tensors(tensors) for name in item.names()]
    assert len(dict(names)) == len(names)
    return {name: item.spec.shape for name, item in names if item.spec is not None}


def dense(layers: int) -> dict[str, Entry]:
    """The tensors of a dense model with one-bit linears."""
    entries = {"model.embed_tokens.weight": entry(96, 64), "model.norm.weight": entry(64)}
    for index in range(layers):
        prefix = f"model.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            entries[f"{prefix}.{name}.weight_packed"] = entry(64, 2, dtype=torch.int32)
            entries[f"{prefix}.{name}.weight_scale"] = entry(64)
            entries[f"{prefix}.{name}.rotation_left"] = entry(1, 8, 8, dtype=torch.float16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            entries[f"{prefix}.{name}.weight"] = entry(64)
    return entries


def test_equal_tensors_of_many_layers_are_one_entry() -> None:
    tensors = describe_tensors(dense(64), {})
    assert len(tensors) == 11
    assert tensors["model.layers.[0-63].input_layernorm.weight"] == "bfloat16 [64]"
    assert tensors["model.layers.[0-63].q_proj.weight_packed"] == "int32 [64, 2]"
    assert tensors["model.norm.weight"] == "bfloat16 [64]"
    assert not any("rotation" in name or "scale" in name for name in tensors)


def test_experts_have_two_numbers() -> None:
    entries = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": entry(32, 64)
        for layer, expert, name in itertools.product(range(3, 48), range(128), ("w1", "w2", "w3"))
    }
    tensors = describe_tensors(entries, {})
    assert tensors.keys() == {
        f"model.layers.[3-47].mlp.experts.[0-127].{name}.weight" for name in ("w1", "w2", "w3")
    }
    assert expand(tensors).keys() == entries.keys()


@pytest.mark.parametrize("left_out", [["a.1.b.0.c"], ["a.0.b.0.c", "a.2.b.3.c"], ["a.1.b.1.c", "a.1.b.2.c"]])
def test_any_set_of_names_is_described_exactly(left_out: list[str]) -> None:
    """Layers that differ: some lack an expert, one has another size, one tensor has no number."""
    entries = {f"a.{i}.b.{j}.c": entry(i % 2 + 1, 7) for i, j in itertools.product(range(5), range(4))}
    entries |= {"a.b.c": entry(), "a.10.b": entry(3), "0.a.7": entry(4)}
    for name in left_out:
        del entries[name]
    tensors = describe_tensors(entries, {})
    assert expand(tensors) == {name: found.shape for name, found in entries.items()}
    assert list(listed_problems(tensors, entries, FOLDER)) == []


def test_hybrids_list_the_layers_of_each_kind() -> None:
    entries = {f"layers.{index}.conv.weight": entry(8) for index in (0, 1, 2, 4, 5, 6, 9)}
    assert describe_tensors(entries, {}) == {"layers.[0-2,4-6,9].conv.weight": "bfloat16 [8]"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"model.layers.1.input_layernorm.weight": None},
            "model: model.layers.1.input_layernorm.weight is missing, expected shape [64]",
        ),
        (
            {"model.layers.2.up_proj.weight_packed": None, "model.layers.3.up_proj.weight_packed": None},
            "model: model.layers.2.up_proj.weight_packed is missing, expected shape [64, 2]",
        ),
        (
            {"model.norm.weight": entry(63)},
            "model/a.safetensors: model.norm.weight: expected shape [64], found [63]",
        ),
        (
            {"model.norm.weight": entry(64, dtype=torch.float16)},
            "model/a.safetensors: model.norm.weight: expected dtype bfloat16, found float16",
        ),
        ({"spare.weight": entry(1)}, "model/a.safetensors: spare.weight is not a tensor of this model"),
        (
            {"model.layers.4.input_layernorm.weight": entry(64)},
            "model/a.safetensors: model.layers.4.input_layernorm.weight is not a tensor of this model",
        ),
    ],
)
def test_differences_are_named(change: dict[str, Entry | None], problem: str) -> None:
    entries = dense(4)
    tensors = describe_tensors(entries, {})
    changed = {name: found for name, found in {**entries, **change}.items() if found is not None}
    problems = list(listed_problems(tensors, changed, FOLDER))
    assert problems[0].startswith(problem)


def test_a_tied_tensor_may_be_stored_or_not() -> None:
    entries = {"embed.weight": entry(8, 4), "lm_head.weight": entry(8, 4)}
    tensors = describe_tensors(entries, {"lm_head.weight": "embed.weight", "other": "embed.weight"})
    assert tensors == {"embed.weight": "bfloat16 [8, 4]", "lm_head.weight": "= embed.weight"}
    assert tied_tensors(tensors, entries) == {"lm_head.weight": "embed.weight"}
    assert list(listed_problems(tensors, entries, FOLDER)) == []
    del entries["lm_head.weight"]
    assert list(listed_problems(tensors, entries, FOLDER)) == []
    assert tied_tensors(tensors, entries) == {}


def test_an_entry_may_stand_for_more_tensors_than_memory_could_hold() -> None:
    tensors = {"a.[0-999999998].b.[0-999999998].c": "float32 [2]"}
    stored = {"a.0.b.0.c": entry(2, dtype=torch.float32)}
    assert list(listed_problems(tensors, stored, FOLDER)) == [
        "model: a.0.b.1.c is missing, expected shape [2]"
    ]


@pytest.mark.parametrize(
    ("pattern", "text", "reason"),
    [
        ("a.[2-1].b", "bfloat16 [1]", "ascending"),
        ("a.[1,1].b", "bfloat16 [1]", "ascending"),
        ("a.[0-3,2].b", "bfloat16 [1]", "ascending"),
        ("a.*.b", "bfloat16 [1]", "expected numbers"),
        ("a", "bfloat17 [1]", "dtype and a shape"),
        ("a", "bfloat16 [-1]", "dtype and a shape"),
        ("a", "bfloat16", "dtype and a shape"),
        ("a", "", "dtype and a shape"),
    ],
)
def test_what_cannot_be_parsed_is_named(pattern: str, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ListedTensors.parse(pattern, text)
