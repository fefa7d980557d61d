"""Samples step through a layer: the same inputs and outputs as in whole runs, with quantized linears put in between."""

from pathlib import Path

import pytest
import torch
from any_model import halve
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.layer_runner import Batch, DecoderLayer, LayerRunner
from bwla_converter.calibration.samples import Samples
from bwla_converter.calibration.stepwise import StepwiseLayer, find_output_projections
from bwla_converter.source.model import Source, open_source
from torch import Tensor, nn

from benchmarks.common.tiny_models import FAMILIES


def hidden_states() -> Tensor:
    return torch.randn(5, 12, 64, generator=torch.Generator().manual_seed(1))


def token_ids() -> Tensor:
    return torch.zeros(5, 12, dtype=torch.long)


def first_linears(source: Source) -> list[str]:
    return [names[0] for _, names in source.groups_of_layer(0)]


def stepwise(layer: DecoderLayer, store: ActivationStore, source: Source) -> StepwiseLayer:
    samples = Samples(store.keep(hidden_states().shape, [hidden_states()]), token_ids())
    projections = find_output_projections(layer, first_linears(source), samples)
    assert {name.rpartition(".")[2] for name in projections} == {"o_proj", "down_proj"}
    return StepwiseLayer(layer, samples, store, projections)


@torch.no_grad()
@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_sees_the_linears_replaced_before_it(
    make_model, family: str, place: str, tmp_path: Path
) -> None:
    source = open_source(str(make_model(family, dtype=torch.float32, lively=True)))
    runner, tensors = LayerRunner(source, torch.device("cpu")), source.read(source.names_of_layer(0))
    whole, stepped = runner.layer(0, tensors), runner.layer(0, tensors)
    store = ActivationStore(tmp_path / "activations" if place == "disk" else None)
    steps, batch = stepwise(stepped, store, source), Batch(hidden_states(), token_ids())
    for group, names in source.groups_of_layer(0):
        expected, expected_stream = whole.inputs_and_stream(names[0], group.stream, batch)
        inputs, streams = zip(*steps.inputs_of(names[0], group.stream), strict=True)
        torch.testing.assert_close(torch.cat(inputs), expected)
        assert all((stream is None) == (group.stream is None) for stream in streams)
        if expected_stream is not None:
            torch.testing.assert_close(torch.cat(streams), expected_stream)
        for name in names:
            halve(whole, name)
            halve(stepped, name)
    torch.testing.assert_close(torch.cat(list(steps.outputs().hidden.split(5))), whole.run(batch))
    # The kept inputs are released, so that the outputs follow later changes of any linear.
    for layer in (whole, stepped):
        halve(layer, first_linears(source)[0])
    torch.testing.assert_close(torch.cat(list(steps.outputs().hidden.split(5))), whole.run(batch))


@torch.no_grad()
def test_no_linear_but_output_projections_runs_twice(make_model) -> None:
    source = open_source(str(make_model(dtype=torch.float32)))
    layer = LayerRunner(source, torch.device("cpu")).layer(0, source.read(source.names_of_layer(0)))
    store = ActivationStore()
    steps = stepwise(layer, store, source)
    tokens: dict[str, int] = {}

    def count(name: str) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens[name] = tokens.get(name, 0) + inputs[0].shape[:-1].numel()

        layer.linear(name).register_forward_pre_hook(hook)

    for name in source.linears_of_layer(0):
        count(name)
    for name in first_linears(source):
        assert sum(inputs.shape[:-1].numel() for inputs, _ in steps.inputs_of(name, None)) == 60
    steps.outputs()
    # The run that stops at a linear counts too: gate_proj once for its inputs, once for those of down_proj.
    ends = {name.rpartition(".")[2]: number / 60 for name, number in tokens.items()}
    assert ends == {
        "q_proj": 2,
        "k_proj": 1,
        "v_proj": 1,
        "o_proj": 4,
        "gate_proj": 2,
        "up_proj": 1,
        "down_proj": 2,
    }
