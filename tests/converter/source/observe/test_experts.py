"""The experts of a decoder layer: which are quantized, under which names, and how stacked tensors are divided."""

from pathlib import Path

import pytest
import torch
from any_model import KINDS, build_any_model, write_any_model
from bwla_converter.checkpoint.dummy import config_source
from bwla_converter.source.model import Source, open_source
from bwla_converter.source.observe.experts import experts_modules, unsupported
from bwla_kernels.errors import SourceError
from torch import nn

STACKED = "stacked experts, and a shared one"
BIASED = "transposed experts with biases"


def source_of(kind: str, folder: Path) -> Source:
    return write_any_model(build_any_model(**KINDS[kind]), folder)


def members(source: Source, index: int = 0) -> list[list[str]]:
    prefix = f"{source.structure.layer_name(index)}."
    return [[name.removeprefix(prefix) for name in names] for _, names in source.groups_of_layer(index)]


def names_of(stem: str, *leaves: str) -> list[str]:
    return [f"{stem}.{number}.{leaf}" for number in range(4) for leaf in leaves]


def test_gate_and_up_of_all_experts_are_one_group_and_down_another(tmp_path: Path) -> None:
    source = source_of("experts", tmp_path)
    assert members(source)[2:] == [
        names_of("mlp.experts", "gate_proj", "up_proj"),
        names_of("mlp.experts", "down_proj"),
    ]
    groups = [group for group, _ in source.groups_of_layer(0)]
    assert [group.input_sharded for group in groups] == [False, True, False, True]


def test_the_stored_names_are_kept(tmp_path: Path) -> None:
    source = source_of("experts under other names", tmp_path)
    stem = "block_sparse_moe.experts"
    assert members(source)[2:] == [names_of(stem, "w1", "w3"), names_of(stem, "w2")]
    name = f"{source.structure.layer_name(0)}.{stem}.3.w2"
    assert source.structure.member_path(name) == "mlp.experts.3.w2"


def test_a_shared_expert_is_in_the_group_of_gate_and_up(tmp_path: Path) -> None:
    groups = members(source_of(STACKED, tmp_path))
    stem = "block_sparse_moe.experts"
    assert [*names_of(stem, "gate_proj", "up_proj"), "shared_mlp.input_linear"] in groups


def test_stacked_experts_are_read_one_by_one(tmp_path: Path) -> None:
    model = build_any_model(**KINDS[STACKED])
    source = write_any_model(model, tmp_path)
    prefix = "model.layers.1.block_sparse_moe.experts"
    block = model.model.layers[1].block_sparse_moe.experts
    names = [f"{prefix}.2.gate_proj.weight", f"{prefix}.2.up_proj.weight", f"{prefix}.3.down_proj.weight"]
    tensors = source.read(names)
    gate, up = block.gate_up_proj[2].detach().chunk(2)
    for name, expected in zip(names, (gate, up, block.down_proj[3].detach()), strict=True):
        assert torch.equal(tensors[name], expected)
        assert source.entries[name].shape == expected.shape
    assert f"{prefix.removesuffix('.experts')}.input_linear.weight" not in source.entries


def test_transposed_experts_are_divided_into_gate_and_up_with_their_biases(tmp_path: Path) -> None:
    model = build_any_model(**KINDS[BIASED])
    source = write_any_model(model, tmp_path)
    prefix = "model.layers.1.mlp.experts"
    experts = model.model.layers[1].mlp.experts
    read = source.read([name for name in source.names_of_layer(1) if name.startswith(f"{prefix}.3.")])
    expected = {
        "gate_proj.weight": experts.gate_up_proj[3, :, ::2].T,
        "gate_proj.bias": experts.gate_up_proj_bias[3, ::2],
        "up_proj.weight": experts.gate_up_proj[3, :, 1::2].T,
        "up_proj.bias": experts.gate_up_proj_bias[3, 1::2],
        "down_proj.weight": experts.down_proj[3].T,
        "down_proj.bias": experts.down_proj_bias[3],
    }
    assert read.keys() == {f"{prefix}.3.{name}" for name in expected}
    for name, tensor in expected.items():
        found, entry = read[f"{prefix}.3.{name}"], source.entries[f"{prefix}.3.{name}"]
        assert torch.equal(found.float(), tensor), name
        assert found.shape == entry.shape
        assert found.dtype == entry.dtype
    assert read[f"{prefix}.3.up_proj.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["experts", STACKED, "experts under other names", BIASED])
def test_transformers_gets_its_own_tensors_back(kind: str, tmp_path: Path) -> None:
    model = build_any_model(**KINDS[kind])
    source = write_any_model(model, tmp_path)
    state = source.block_state(1, source.read(source.names_of_layer(1)))
    expected = model.model.layers[1].state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def test_ignored_experts_stay_as_they_are_stored(tmp_path: Path) -> None:
    build_any_model(**KINDS[STACKED]).save_pretrained(tmp_path)
    source = open_source(str(tmp_path), ("experts",))
    assert "model.layers.0.block_sparse_moe.input_linear.weight" in source.entries
    assert ["shared_mlp.input_linear"] in members(source)
    assert source.experts_of_layer(0) is None
    state = source.block_state(0, source.read(source.names_of_layer(0)))
    assert state["block_sparse_moe.experts.gate_up_proj"].shape == (4, 256, 64)


def test_some_experts_cannot_be_ignored(tmp_path: Path) -> None:
    build_any_model(**KINDS["experts"]).save_pretrained(tmp_path)
    source = open_source(str(tmp_path), ("mlp.experts.1",))
    with pytest.raises(SourceError, match="--ignore experts leaves all of them"):
        list(source.groups_of_layer(0))


def test_a_config_alone_gives_the_same_groups(tmp_path: Path) -> None:
    source = source_of(STACKED, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert members(config_source(tmp_path)) == members(source)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            {
                "architecture": "GptOssForCausalLM",
                "model_type": "gpt_oss",
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "swiglu_limit": 5.0,
            },
            "experts with a gating function of their own",
        ),
        (
            {
                "architecture": "NemotronHForCausalLM",
                "model_type": "nemotron_h",
                "layers_block_type": ["attention", "moe"],
                "n_routed_experts": 4,
                "moe_intermediate_size": 64,
                "moe_shared_expert_intermediate_size": 64,
            },
            "experts without a gate",
        ),
    ],
)
def test_what_no_kernel_computes_stays_in_16_bits_and_says_why(
    kind: dict[str, object], reason: str, tmp_path: Path
) -> None:
    source = write_any_model(build_any_model(**kind), tmp_path)  # type: ignore[arg-type]
    assert not source.structure.experts
    assert any(reason in found for found in source.structure.kept.values())


def test_an_activation_without_a_kernel_is_recognized(tmp_path: Path) -> None:
    model = build_any_model(**KINDS["experts"])
    [experts] = experts_modules(model.model.layers[0]).values()
    assert unsupported(experts) is None
    experts.act_fn = nn.ReLU()
    assert unsupported(experts) == "experts with this activation have no kernel"
