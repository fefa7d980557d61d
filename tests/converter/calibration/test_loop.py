"""The calibration loop: what a recipe is given for each input group, and how the hidden states go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bwla_converter.calibration.activations import StoredStates
from bwla_converter.calibration.loop import CalibrationLoop
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration
from bwla_converter.quantize import data_free
from bwla_converter.quantize.group import GroupResult
from bwla_converter.source.model import Source, open_source
from bwla_kernels.format import LayerSpec
from paths import EXAMPLE
from torch import Tensor

NAME = "model.layers.0.mlp.down_proj"
SPEC = LayerSpec(64, 128, 1, 8, 16, rank=1, clip=0.9)


@pytest.fixture
def source(make_model) -> Source:
    vocab_size = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    folder: Path = make_model("Qwen3", vocab_size=vocab_size)
    for file in EXAMPLE.glob("tokenizer*"):
        shutil.copy(file, folder)
    return open_source(str(folder))


class Recorder:
    """Quantizes groups by their weights alone, and records what the loop passed."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __call__(self, weights, specs, moments, inputs) -> GroupResult:
        self.calls.append((weights, specs, moments, inputs))
        result = data_free.quantize_group(weights, specs, options=data_free.DataFreeOptions(2, 2, 2))
        return GroupResult(result.tensors, result.errors, clip=0.5)


def make_loop(source: Source, tmp_path: Path, recorder: Recorder, **options: bool) -> CalibrationLoop:
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking. " * 20)
    return CalibrationLoop(source, Calibration(str(text), 5, 16), 0, recorder, **options)


def every(hidden) -> Tensor:
    return hidden[torch.arange(5)]


def test_a_group_is_quantized_for_its_inputs_in_the_quantized_model(source: Source, tmp_path: Path) -> None:
    recorder = Recorder()
    loop = make_loop(source, tmp_path, recorder)
    tensors = source.read(source.names_of_layer(0))
    loop.begin_layer(0, tensors)
    original, quantized = loop.layers
    # After any change before the group, its inputs differ from the original's.
    quantized.linear("model.layers.0.mlp.up_proj").weight.data *= 1.1
    result = loop.quantize({NAME: tensors[f"{NAME}.weight"]}, {NAME: SPEC})
    with torch.no_grad():
        x_hat = quantized.inputs_of(NAME, loop.samples[torch.arange(5)]).flatten(0, -2)
        x = original.inputs_of(NAME, loop.original_samples[torch.arange(5)]).flatten(0, -2)
    [(_, _, moments, inputs)] = recorder.calls
    assert moments.count == len(x) == 5 * 16
    torch.testing.assert_close(moments.gram, x_hat.mT @ x_hat)
    assert moments.cross_gram is None
    # Up to the group the layers differ in up_proj alone, so the residual streams agree.
    error = (x - x_hat) @ tensors[f"{NAME}.weight"].float().mT
    torch.testing.assert_close(moments.error_cross_gram, error.mT @ x_hat)
    torch.testing.assert_close(inputs, x_hat)
    assert result.inputs is inputs
    linear = quantized.linear(NAME)
    assert isinstance(linear, BWLALinear)
    assert linear.spec.clip == 0.5
    assert not isinstance(original.linear(NAME), BWLALinear)


def test_the_hidden_states_of_each_model_run_through_its_own_layer(source: Source, tmp_path: Path) -> None:
    loop = make_loop(source, tmp_path, Recorder())
    tensors = source.read(source.names_of_layer(0))
    loop.begin_layer(0, tensors)
    assert torch.equal(every(loop.hidden), every(loop.original_hidden))
    loop.quantize({NAME: tensors[f"{NAME}.weight"]}, {NAME: SPEC})
    original, quantized = loop.layers
    with torch.no_grad():
        expected = [layer.run(loop.samples[torch.arange(5)]) for layer in (original, quantized)]
    loop.end_layer()
    torch.testing.assert_close(every(loop.original_hidden), expected[0])
    torch.testing.assert_close(every(loop.hidden), expected[1])
    assert not torch.equal(every(loop.hidden), every(loop.original_hidden))
    with pytest.raises(AssertionError):
        _ = loop.layers


def test_a_state_continues_in_another_session(source: Source, tmp_path: Path) -> None:
    first, second = (make_loop(source, tmp_path, Recorder()) for _ in range(2))
    first.begin_layer(0, source.read(source.names_of_layer(0)))
    first.end_layer()
    state = first.state()
    assert not any(isinstance(stored, StoredStates) for stored in state.values())
    second.restore(state)
    for loop in (first, second):
        loop.begin_layer(1, source.read(source.names_of_layer(1)))
        loop.end_layer()
    assert torch.equal(every(first.hidden), every(second.hidden))
    assert first.fit_final_norm().keys() == {"model.norm.weight"}


def test_the_calibration_data_is_described(source: Source, tmp_path: Path) -> None:
    description = make_loop(source, tmp_path, Recorder()).description
    assert (description["source"], description["samples"], description["length"]) == ("text.txt", 5, 16)
    assert len(str(description["sha256"])) == 64


def test_the_quantized_model_can_run_alone(source: Source, tmp_path: Path) -> None:
    recorder = Recorder()
    both, alone = (
        make_loop(source, tmp_path, Recorder()),
        make_loop(source, tmp_path, recorder, run_original=False),
    )
    tensors = source.read(source.names_of_layer(0))
    for loop in (both, alone):
        loop.begin_layer(0, tensors)
        loop.quantize({NAME: tensors[f"{NAME}.weight"]}, {NAME: SPEC})
        loop.end_layer()
    assert torch.equal(every(alone.hidden), every(both.hidden))
    [(_, _, moments, _)] = recorder.calls
    assert moments.count == 5 * 16
    assert moments.cross_gram is None
    assert moments.error_cross_gram is None
    assert alone.state().keys() == {"hidden"}
    resumed = make_loop(source, tmp_path, Recorder(), run_original=False)
    resumed.restore(alone.state())
    assert torch.equal(every(resumed.hidden), every(alone.hidden))
