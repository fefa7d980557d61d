"""Samples on their way through layers that share keys and values: kept, stored, taken again, and differentiated."""

from pathlib import Path

import pytest
import torch
from any_model import KINDS, build_any_model, halve, write_any_model
from bwla_converter.allocation.sensitivity import SharedGradients, _backward
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.layer_runner import Batch, DecoderLayer, LayerRunner
from bwla_converter.calibration.samples import Samples
from bwla_converter.calibration.stepwise import StepwiseLayer, find_output_projections
from bwla_converter.source.model import Source
from torch import Tensor

SHARED = ["several streams, shared keys", "shared keys by kind"]
MIXERS = ["Mamba beside attention", "convolutions", "linear attention", "parallel branches"]


def token_ids() -> Tensor:
    return torch.randint(1, 90, (5, 12), generator=torch.Generator().manual_seed(0))


def make(kind: str, folder: Path) -> tuple[Source, LayerRunner]:
    source = write_any_model(build_any_model(**KINDS[kind]), folder / "model")
    return source, LayerRunner(source, torch.device("cpu"))


def layer_of(runner: LayerRunner, index: int) -> DecoderLayer:
    return runner.layer(index, runner.source.read(runner.source.names_of_layer(index)))


@torch.no_grad()
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_samples_continue_in_another_session(kind: str, place: str, tmp_path: Path) -> None:
    source, runner = make(kind, tmp_path)
    store = ActivationStore(tmp_path / "activations" if place == "disk" else None)
    samples = Samples.embedded(runner, store, token_ids(), 4)
    for index in range(2):
        samples = samples.run(layer_of(runner, index), store, 4)
    assert len(samples.shared) == 2
    taken = Samples.take(samples.stored("hidden"), "hidden", store, token_ids())
    for index in range(2, source.num_layers):
        samples = samples.run(layer_of(runner, index), store, 4)
        taken = taken.run(layer_of(runner, index), store, 4)
    every = torch.arange(5)
    assert torch.equal(taken.hidden[every], samples.hidden[every])


@torch.no_grad()
@pytest.mark.parametrize("kind", SHARED)
def test_samples_in_any_order_are_those_of_the_batches(kind: str, tmp_path: Path) -> None:
    source, runner = make(kind, tmp_path)
    store = ActivationStore()
    samples = Samples.embedded(runner, store, token_ids(), 5)
    for index in range(source.num_layers):
        layer, order = layer_of(runner, index), torch.tensor([3, 0])
        picked = layer.run(samples[order])
        samples = samples.run(layer, store, 2)
        torch.testing.assert_close(picked, samples.hidden[order])


@torch.no_grad()
@pytest.mark.parametrize("kind", [*SHARED, *MIXERS])
def test_every_step_sees_the_linears_replaced_before_it(kind: str, tmp_path: Path) -> None:
    source, runner = make(kind, tmp_path)
    store = ActivationStore()
    samples = Samples.embedded(runner, store, token_ids(), 5)
    for index in range(source.num_layers):
        whole, stepped = layer_of(runner, index), layer_of(runner, index)
        firsts = [names[0] for _, names in source.groups_of_layer(index)]
        projections = find_output_projections(stepped, firsts, samples)
        steps, batch = StepwiseLayer(stepped, samples, store, projections), samples[torch.arange(5)]
        for _, names in source.groups_of_layer(index):
            inputs = torch.cat([found for found, _ in steps.inputs_of(names[0], None)])
            torch.testing.assert_close(inputs, whole.inputs_of(names[0], batch))
            for name in names:
                halve(whole, name)
                halve(stepped, name)
        outputs, left = whole.run_sharing(batch)
        samples = steps.outputs()
        torch.testing.assert_close(samples.hidden[torch.arange(5)], outputs)
        for key, parts in left.items():
            for part, expected in zip(samples.shared[key], parts, strict=True):
                torch.testing.assert_close(part[torch.arange(5)], expected)


@pytest.mark.parametrize("kind", SHARED)
def test_gradients_flow_through_shared_states(kind: str, tmp_path: Path) -> None:
    """Layer by layer, from the last to the first, the gradient is that of all layers in one graph."""
    source, runner = make(kind, tmp_path)
    layers = [layer_of(runner, index) for index in range(source.num_layers)]
    embedded = runner.embed(token_ids())
    leaf, shared = embedded.clone().requires_grad_(True), {}
    hidden, batches = leaf, []
    for layer in layers:
        detached = {key: tuple(part.detach() for part in parts) for key, parts in shared.items()}
        batches.append(Batch(hidden.detach(), token_ids(), detached))
        hidden, left = layer.run_sharing(Batch(hidden, token_ids(), shared))
        shared = {**shared, **left}
    last = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    hidden.backward(last)
    gradient, of_shared = last, SharedGradients()
    for layer, batch in zip(reversed(layers), reversed(batches), strict=True):
        gradient = _backward(layer, batch, gradient, of_shared)
    assert not of_shared
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad)
