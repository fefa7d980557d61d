"""Stored names: models that transformers renames or joins are opened, and their layers load from stored tensors."""

from pathlib import Path

import pytest
import torch
import transformers
from bwla_converter.hf.expert_linears import divide_experts
from bwla_converter.source.model import Source, check_values, open_source
from bwla_kernels.errors import SourceError
from decoder_configs import write_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from benchmarks.coverage.cases import CASES

RENAMED = [
    "mixtral",
    "gpt_neox",
    "deepseek_v3",
    "qwen3_5",
    "gemma3",
    "qwen2_5_vl",
    "nemotron_h",
    "gpt_oss",
    "qwen3_vl_moe",
]


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, PreTrainedModel]:
    """Return the folder of a saved random model, and the model."""
    name: str = request.param
    config = AutoConfig.from_pretrained(write_config(tmp_path, name))
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, CASES[name].architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path, model


def assert_layers_load(source: Source, model: PreTrainedModel) -> None:
    for index in range(source.num_layers):
        block = model.get_submodule(source.structure.layer_path(index))
        state = source.block_state(index, source.read(source.names_of_layer(index)))
        expected = block.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("saved", ["llama", *RENAMED], indirect=True)
def test_layers_load_from_stored_tensors(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    stored = load_file(folder / "model.safetensors")
    source = open_source(str(folder))
    check_values(source)
    for index, experts in source.structure.experts.items():
        prefix = f"{source.structure.layer_name(index)}."
        divided = experts.split(prefix, stored)
        stored = {
            name: stored[name]
            for name in stored.keys() - {f"{prefix}{name}" for name in (*experts.stacked, *experts.biases)}
        }
        stored |= divided
    assert source.entries.keys() == stored.keys()
    assert_layers_load(source, model)
    linears = [linear for _, linear in source.structure.linears()]
    assert linears
    for index, experts in source.structure.experts.items():
        divide_experts(model.get_submodule(source.structure.layer_path(index)), experts)
    for linear in linears:
        module = model.get_submodule(source.structure.module_path(linear))
        assert torch.equal(module.weight, stored[f"{linear}.weight"])
        if f"{linear}.bias" in stored:
            assert torch.equal(module.bias, stored[f"{linear}.bias"])
    embedding = model.get_submodule(source.structure.module_path(source.structure.embedding))
    assert torch.equal(embedding.weight, stored[source.embedding_weight])
    layers = [name for index in range(source.num_layers) for name in source.names_of_layer(index)]
    assert sorted([*layers, *source.names_outside_layers()]) == sorted(stored)


@pytest.mark.parametrize("saved", ["mixtral"], indirect=True)
def test_an_expert_that_is_missing_or_of_another_shape(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = saved
    path, name = folder / "model.safetensors", "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    whole = load_file(path)
    for tensors in (
        {key: tensor for key, tensor in whole.items() if key != name},
        {**whole, name: torch.zeros(3, 64, dtype=torch.bfloat16)},
    ):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(
            SourceError, match=r"that make up model.layers.0.mlp.experts.gate_up_proj of shape"
        ):
            open_source(str(folder))


@pytest.mark.parametrize("number", ["1000", "01", "-1", "x"])
@pytest.mark.parametrize("leaf", ["w1", "w2"])
@pytest.mark.parametrize("saved", ["mixtral"], indirect=True)
def test_an_expert_with_another_number(saved: tuple[Path, PreTrainedModel], leaf: str, number: str) -> None:
    """Transformers stacks as many experts as there are, so the shape of its parameter is right."""
    folder, _ = saved
    path, stem = folder / "model.safetensors", "model.layers.0.block_sparse_moe.experts."
    tensors = load_file(path)
    tensors[f"{stem}{number}.{leaf}.weight"] = tensors.pop(f"{stem}1.{leaf}.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=rf"{number}\.{leaf}\.weight: expected the number of one of"):
        open_source(str(folder))


@pytest.mark.parametrize("saved", ["qwen3_5"], indirect=True)
def test_tensors_that_transformers_leaves_out_are_copied(saved: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = saved
    path = folder / "model.safetensors"
    extra = {"mtp.layers.0.mlp.down_proj.weight": torch.zeros(64, 128, dtype=torch.bfloat16)}
    save_file({**load_file(path), **extra}, path, metadata={"format": "pt"})
    source = open_source(str(folder))
    assert extra.keys() <= set(source.names_outside_layers())
    assert "mtp" in source.structure.kept
    assert "visual" in source.structure.kept


@pytest.mark.parametrize("saved", ["qwen3_vl_moe"], indirect=True)
def test_tensors_that_are_stored_transposed(saved: tuple[Path, PreTrainedModel]) -> None:
    """Transformers decides by the shape of the parameter whether it transposes Qwen3-VL's experts."""
    folder, model = saved
    file = folder / "model.safetensors"
    turned = {
        name: tensor.mT.contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(turned, file, {"format": "pt"})
    assert_layers_load(open_source(str(folder)), model)
