"""`quantization_config`: round trips, look-ups, and refusals that name the place."""

import copy

import pytest
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.schema import BWLAFormat, longest_suffix, parse_config

ROTATION = {"q_proj": (1, 8, 8), "down_proj": (2, 8, 16), "1.mlp.down_proj": (4, 8, 8)}


def config(**changes: object) -> dict:
    data = BWLAFormat(rotation=ROTATION, rank=2).to_json()
    data.update(copy.deepcopy(changes))
    return data


def test_json_round_trip() -> None:
    parsed = parse_config(config())
    assert parsed == BWLAFormat(rotation=ROTATION, rank=2)
    assert parsed.to_json() == config()
    assert config()["weights"] == {
        "num_bits": 1, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False
    }  # fmt: skip


def test_the_longest_suffix_wins_at_a_dot() -> None:
    assert longest_suffix(ROTATION, "model.layers.1.mlp.down_proj") == (4, 8, 8)
    assert longest_suffix(ROTATION, "model.layers.11.mlp.down_proj") == (2, 8, 16)
    assert longest_suffix(ROTATION, "model.layers.0.mlp.my_down_proj") is None


def test_layer_spec_takes_rank_and_clip_by_suffix() -> None:
    parsed = parse_config(config(rank={"q_proj": 3}, clip={"0.q_proj": 0.9}))
    assert parsed.layer_spec("a.0.q_proj", 10, 64) == LayerSpec(10, 64, 1, 8, 8, rank=3, clip=0.9)
    assert parsed.layer_spec("a.1.q_proj", 10, 64) == LayerSpec(10, 64, 1, 8, 8, rank=3, clip=1.0)
    assert parsed.layer_spec("a.0.down_proj", 10, 256) == LayerSpec(10, 256, 2, 8, 16, rank=0)
    assert parsed.layer_spec("a.0.up_proj", 10, 64) is None


def test_version_2_gives_planes_by_suffix() -> None:
    parsed = parse_config(config(format_version=2, planes={"q_proj": 3}))
    assert parsed.layer_spec("a.0.q_proj", 10, 64) == LayerSpec(10, 64, 1, 8, 8, rank=2, planes=3)
    assert parsed.layer_spec("a.0.down_proj", 10, 256) == LayerSpec(10, 256, 2, 8, 16, rank=2)
    assert parse_config(parsed.to_json()) == parsed


def test_linears_are_written_where_they_are_listed() -> None:
    kinds = [
        {"layers": "model.layers", "indices": [0, 2], "names": ["conv.in_proj"]},
        {"layers": "model.layers", "indices": [1], "names": ["self_attn.q_proj", "mlp.w1"]},
    ]
    parsed = parse_config(config(linears=kinds))
    assert parsed.to_json()["linears"] == kinds
    assert parse_config(parsed.to_json()) == parsed
    assert parsed.linears is not None
    assert [name for kind in parsed.linears for name in kind.full_names()] == [
        "model.layers.0.conv.in_proj",
        "model.layers.2.conv.in_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.w1",
    ]
    assert "linears" not in config()
    with pytest.raises(FormatError, match=r"linears.0.names: Field required"):
        parse_config(config(linears=[{"layers": "model.layers", "indices": [0]}]))


def test_version_1_does_not_mention_planes() -> None:
    assert "planes" not in config()


def test_version_2_gives_an_8_bit_embedding() -> None:
    parsed = parse_config(config(format_version=2, embedding={"num_bits": 8, "strategy": "channel"}))
    assert parsed.embedding is not None
    assert parsed.lm_head is None
    assert parse_config(parsed.to_json()) == parsed
    assert "embedding" not in config()


def test_ignored_layers_have_no_spec() -> None:
    parsed = parse_config(config(ignore=["re:.*layers\\.0\\..*", "lm_head"]))
    assert parsed.layer_spec("model.layers.0.q_proj", 10, 64) is None
    assert parsed.layer_spec("model.layers.1.q_proj", 10, 64) is not None
    assert parsed.is_ignored("lm_head")


@pytest.mark.parametrize(
    ("entry", "name", "matches"),
    [
        ("down_proj", "model.layers.0.mlp.down_proj", True),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("model.layers.1", "model.layers.1.mlp.down_proj", True),
        ("model.layers.1", "model.layers.12.mlp.down_proj", False),
        ("layers.1.mlp", "model.layers.1.mlp.down_proj", True),
        ("mlp", "model.layers.1.mlp.down_proj", True),
        ("proj", "model.layers.1.mlp.down_proj", False),
        ("re:.*[.]1[.].*", "model.layers.1.mlp.down_proj", True),
        ("re:down_proj", "model.layers.1.mlp.down_proj", False),
    ],
)
def test_an_entry_of_ignore_matches_whole_parts_of_a_name(entry: str, name: str, matches: bool) -> None:
    assert parse_config(config(ignore=[entry])).is_ignored(name) is matches


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quant_method": "gptq"}, "expected quant_method 'bwla', found 'gptq'"),
        ({"format_version": 3}, "expected format_version 1 or 2, found 3"),
        ({"format_version": None}, "expected format_version 1 or 2, found None"),
        ({"format_version": True}, "expected format_version 1 or 2, found True"),
        ({"planes": 2}, "planes other than 1 need format_version 2, found 2"),
        ({"format_version": 2, "planes": {"q_proj": 5}}, "planes must be 1..4, found {'q_proj': 5}"),
        ({"format_version": 2, "planes": 0}, "planes must be 1..4, found 0"),
        (
            {"embedding": {"num_bits": 8, "strategy": "channel"}},
            "an 8-bit embedding needs format_version 2, found 1",
        ),
        (
            {"format_version": 2, "embedding": {"num_bits": 4, "strategy": "channel"}},
            "embedding must be 8-bit, symmetric, one scale per row",
        ),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"rotation": {"q_proj": [0, 8, 8]}}, "rotation sizes must be positive"),
        ({"rotation": {"q_proj": [8, 8]}}, "rotation.q_proj"),
        ({"clip": "wide"}, "clip"),
        ({"weights": {"num_bits": 2}}, "weights must be 1-bit"),
        ({"input_activations": {"num_bits": 6}}, "input_activations must be dynamic"),
    ],
)
def test_wrong_configs_say_what_was_found(changes: dict, sentence: str) -> None:
    with pytest.raises(FormatError, match=r"config\.json") as error:
        parse_config(config(**changes), "model/config.json")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("changes", "name", "sentence"),
    [
        ({}, "a.q_proj", "covers 64 columns, but the layer reads 128"),
        ({"clip": 1.5, "rotation": {"q_proj": [1, 8, 16]}}, "a.q_proj", "clip must lie in"),
        ({"rotation": {"q_proj": [8, 4, 4]}}, "a.q_proj", "multiple of 32"),
        (
            {"rotation": {"q_proj": [1, 8, 16]}, "input_activations": {
                "num_bits": 9, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}},
            "a.q_proj", "activation bits must be 2..8 or 16, found 9",
        ),
    ],
)  # fmt: skip
def test_configs_that_contradict_the_model_name_the_layer(changes: dict, name: str, sentence: str) -> None:
    with pytest.raises(FormatError, match=r"a\.q_proj") as error:
        parse_config(config(**changes)).layer_spec(name, 10, 128)
    assert sentence in str(error.value)
