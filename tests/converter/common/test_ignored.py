"""`--ignore`: entries that match nothing are refused, with what was probably meant."""

import pytest
from bwla_converter.common.ignored import check_ignored, near_matches
from bwla_kernels.errors import SourceError

MODULES = [
    "model.embed_tokens",
    "lm_head",
    *(
        f"model.layers.{index}.{member}"
        for index in range(12)
        for member in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ),
]


@pytest.mark.parametrize(
    "entry",
    [
        "down_proj",
        "mlp.down_proj",
        "model.layers.3.mlp.down_proj",
        "model.layers.3",
        "layers.3.mlp",
        "mlp",
        "lm_head",
        "embed_tokens",
        "model.embed_tokens",
        "re:.*down_proj",
        "re:model[.]layers[.](3|4)[.].*",
    ],
)
def test_names_endings_paths_and_patterns_that_match(entry: str) -> None:
    check_ignored([entry], MODULES)


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("down_porj", "down_proj"),
        ("downproj", "down_proj"),
        ("mlp.down_project", "mlp.down_proj"),
        ("model.layer.3", "model.layers.3"),
        ("model.layers.12", "model.layers.1"),
        ("self_attention.q_proj", "self_attn.q_proj"),
        ("lm_heads", "lm_head"),
        ("re:down_proj", "down_proj"),
        ("re:.*down_porj", "down_proj"),
        ("DOWN_PROJ", ""),
        ("nothing like it", ""),
        ("proj", ""),
        ("", ""),
    ],
)
def test_an_entry_that_matches_nothing_shows_near_matches(entry: str, near: str) -> None:
    with pytest.raises(SourceError, match="expected a module that would be quantized") as caught:
        check_ignored(["mlp.down_proj", entry], MODULES)
    assert str(caught.value).startswith(f"--ignore {entry}: ")
    assert near in str(caught.value)


@pytest.mark.parametrize("entry", ["re:(", "re:*proj", "re:[a-", "re:(?P<x"])
def test_a_bad_pattern_is_named(entry: str) -> None:
    with pytest.raises(SourceError, match=r"expected a regular expression, found an error in it \("):
        check_ignored([entry], MODULES)


def test_near_matches_of_a_model_with_many_layers_are_few() -> None:
    assert 0 < len(near_matches("model.layers.3.mlp.down_porj", MODULES)) <= 3
