"""Blocks one at a time compute what the whole model computes, for every family."""

import pytest
import torch
from bwla_converter.families import FAMILIES
from bwla_converter.shell import Shell
from bwla_converter.source import open_source
from torch import Tensor, nn


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_block_after_block_is_the_model(make_model, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model(family, dtype=torch.float32)
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = open_source(str(folder))
    shell = Shell(source, torch.device("cpu"))
    hidden = shell.embed(ids)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True).hidden_states
        for index in range(source.num_blocks):
            torch.testing.assert_close(hidden, expected[index], rtol=1e-4, atol=1e-4)
            hidden = shell.block(index, source.read(source.names_of_block(index))).run(hidden)
        torch.testing.assert_close(model.model.norm(hidden), expected[-1], rtol=1e-4, atol=1e-4)


def test_watching_and_replacing(make_model) -> None:
    source = open_source(str(make_model(dtype=torch.float32)))
    shell = Shell(source, torch.device("cpu"))
    block = shell.block(1, source.read(source.names_of_block(1)))
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    with block.watch(name, seen.append), torch.no_grad():
        before = block.run(hidden)
    assert seen[0].shape == (2, 5, 128)
    block.replace(name, nn.Linear(128, 64, bias=False))
    with torch.no_grad():
        assert not torch.equal(block.run(hidden), before)
    assert len(seen) == 1
    assert block.linear(name) is block.layer.mlp.down_proj
