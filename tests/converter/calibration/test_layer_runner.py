"""Layers that run one at a time compute the same as the whole model, for every family."""

import pytest
import torch
from bwla_converter.calibration.layer_runner import Batch, LayerRunner
from bwla_converter.source.model import open_source
from bwla_kernels.errors import SourceError
from torch import nn

from benchmarks.common.tiny_models import FAMILIES


def random_batch(length: int) -> Batch:
    hidden = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(1))
    return Batch(hidden, torch.zeros(2, length, dtype=torch.long))


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_after_layer_is_the_model(make_model, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(family, dtype=torch.float32, lively=True)
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    source = open_source(str(folder))
    runner = LayerRunner(source, torch.device("cpu"))
    hidden = runner.embed(ids)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        for index in range(source.num_layers):
            torch.testing.assert_close(hidden, expected[index], rtol=1e-4, atol=1e-4)
            layer = runner.layer(index, source.read(source.names_of_layer(index)))
            hidden = layer.run(Batch(hidden, ids))
        torch.testing.assert_close(model.model.norm(hidden), expected[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_inputs_of_every_group_are_those_in_the_whole_model(make_model, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(family, dtype=torch.float32, lively=True)
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    model(ids)
    source = open_source(str(folder))
    runner = LayerRunner(source, torch.device("cpu"))
    hidden = runner.embed(ids)
    for index in range(source.num_layers):
        layer = runner.layer(index, source.read(source.names_of_layer(index)))
        for _, names in source.groups_of_layer(index):
            group_inputs = layer.inputs_of(names[0], Batch(hidden, ids))
            for name in names:
                torch.testing.assert_close(group_inputs, inputs[name], rtol=1e-4, atol=1e-4)
        hidden = layer.run(Batch(hidden, ids))


def test_inspecting_and_modifying_a_layer(make_model) -> None:
    source = open_source(str(make_model(dtype=torch.float32)))
    layer = LayerRunner(source, torch.device("cpu")).layer(1, source.read(source.names_of_layer(1)))
    batch = random_batch(5)
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        before = layer.run(batch)
        inputs = layer.inputs_of(name, batch)
        mlp = layer.layer.mlp
        attended = before - mlp.down_proj(inputs)
        again = mlp.act_fn(mlp.gate_proj(layer.layer.post_attention_layernorm(attended)))
        again = again * mlp.up_proj(layer.layer.post_attention_layernorm(attended))
        torch.testing.assert_close(inputs, again, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer.run(batch), before)
        layer.replace(name, nn.Linear(128, 64, bias=False))
        assert not torch.equal(layer.run(batch), before)
    assert layer.linear(name) is layer.layer.mlp.down_proj


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_resumed_at_known_inputs_computes_the_same(make_model, family: str) -> None:
    source = open_source(str(make_model(family, dtype=torch.float32, lively=True)))
    layer = LayerRunner(source, torch.device("cpu")).layer(0, source.read(source.names_of_layer(0)))
    batch = random_batch(20)
    projections = layer.output_projections([names[0] for _, names in source.groups_of_layer(0)], batch)
    assert {name.rpartition(".")[2] for name in projections} == {"o_proj", "down_proj"}
    before = layer.run(batch)
    known = {name: layer.inputs_of(name, batch) for name in projections}

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    names = [names[0] for _, names in source.groups_of_layer(0) if names[0] not in projections]
    handles = [layer.linear(name).register_forward_pre_hook(fail) for name in names]
    with layer.resumed(known, projections):
        assert torch.equal(layer.run(batch), before)
    with pytest.raises(AssertionError, match="computed again"):
        layer.run(batch)
    for handle in handles:
        handle.remove()
    assert torch.equal(layer.run(batch), before)


def test_a_linear_that_is_not_used_is_noticed(make_model) -> None:
    source = open_source(str(make_model()))
    layer = LayerRunner(source, torch.device("cpu")).layer(0, source.read(source.names_of_layer(0)))
    layer.layer.spare = nn.Linear(4, 4)
    with pytest.raises(SourceError, match="expected the model to use this linear"), torch.no_grad():
        layer.inputs_of("model.layers.0.spare", random_batch(3))
