"""Layers of any class, run one at a time, compute the whole model's hidden states and logits to the last bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from any_model import KINDS, build_any_model, write_any_model
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.calibration.layer_runner import LayerRunner
from bwla_converter.calibration.samples import Samples
from bwla_converter.hf.whole_model import choose_attention
from bwla_converter.source.model import Source
from bwla_converter.source.observe.decoder import language_model_of
from bwla_kernels.errors import SourceError
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    Kosmos2Config,
    Kosmos2Model,
    PreTrainedModel,
)

from benchmarks.coverage.build import build
from benchmarks.coverage.cases import CASES

CPU = torch.device("cpu")
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
BLIP = BlipConfig(
    text_config={**TEXT, "encoder_hidden_size": 32, "vocab_size": 96, "max_position_embeddings": 32},
    vision_config={**VISION, "num_attention_heads": 2},
)
KOSMOS = Kosmos2Config(
    text_config={"embed_dim": 64, "layers": 2, "ffn_dim": 64, "attention_heads": 2, "vocab_size": 96},
    vision_config={**VISION, "num_attention_heads": 2},
)


def token_ids() -> Tensor:
    return torch.randint(1, 90, (3, 20), generator=torch.Generator().manual_seed(0))


def make(kind: str, folder: Path) -> tuple[PreTrainedModel, Source]:
    model = build_any_model(**KINDS[kind])
    choose_attention(model, CPU)
    source = write_any_model(model, folder / "model")
    # The norm that joined streams go through is not observed, but can be given.
    final_norm = source.structure.final_norm or "model.norm"
    return model, replace(source, structure=replace(source.structure, final_norm=final_norm))


def outputs_of_blocks(model: PreTrainedModel, name: str) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of every decoder layer, and the logits."""
    outputs: list[Tensor] = []
    for block in model.get_submodule(name).children():
        block.register_forward_hook(
            lambda _, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
    logits: Tensor = model(token_ids(), use_cache=False).logits
    return outputs, logits


def whole(samples: Samples) -> Tensor:
    return torch.cat(list(samples.hidden.split(3)))


def assert_same(found: Tensor, expected: Tensor, kind: str) -> None:
    """Compare to the last bit, but where linears take the place of products with transposed weights."""
    if kind == "transposed experts with biases":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_layer_after_layer_is_the_model_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    model, source = make(kind, tmp_path)
    runner, store = LayerRunner(source, CPU), ActivationStore()
    expected, logits = outputs_of_blocks(model, runner.outer.blocks_name)
    samples = Samples.embedded(runner, store, token_ids(), 3)
    for index in range(source.num_layers):
        layer = runner.layer(index, source.read(source.names_of_layer(index)))
        samples = samples.run(layer, store, 3)
        found = whole(samples).movedim(0, runner.outer.conventions.sample_axis)
        assert_same(found, expected[index], kind)
    assert runner.outer.norm_inputs(whole(samples)[:1]) is not None
    normed = runner.outer.normed(whole(samples))
    assert_same(runner.outer.logits(normed.flatten(0, 1)).view_as(logits), logits, kind)
    assert runner.outer.vocabulary == logits.shape[-1] == 96


@torch.no_grad()
@pytest.mark.parametrize("name", ["idefics3", "blip-2", "blip"])
def test_the_decoder_of_a_multimodal_model_runs_alone(name: str, tmp_path: Path) -> None:
    """Idefics 3 asks its vision tower for the device, BLIP-2 wants images, and BLIP does not show its head."""
    model = BlipForConditionalGeneration(BLIP) if name == "blip" else build(CASES[name])
    source = write_any_model(model.eval(), tmp_path / "model")
    assert source.structure.has_head
    runner, store = LayerRunner(source, CPU), ActivationStore()
    samples = Samples.embedded(runner, store, token_ids(), 3)
    for index in range(source.num_layers):
        samples = samples.run(runner.layer(index, source.read(source.names_of_layer(index))), store, 3)
    logits = runner.outer.logits(runner.outer.normed(whole(samples)).flatten(0, 1))
    expected = language_model_of(model)(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(logits.view_as(expected), expected)


def test_a_model_that_needs_images_is_refused(tmp_path: Path) -> None:
    source = write_any_model(Kosmos2Model(KOSMOS), tmp_path / "model")
    with pytest.raises(
        SourceError, match=r"Kosmos2Model to run on token ids alone.*pixel_values.*not supported"
    ):
        _ = LayerRunner(source, CPU).outer.conventions


def test_a_model_without_a_plain_final_norm(tmp_path: Path) -> None:
    _, source = make("biases", tmp_path)
    other = replace(source, structure=replace(source.structure, final_norm=""))
    outer = LayerRunner(other, CPU).outer
    assert outer.final_norm() is None
    assert outer.norm_inputs(torch.randn(1, 4, 64)) is None


def test_a_decoder_without_the_expected_layers(tmp_path: Path) -> None:
    _, source = make("biases", tmp_path)
    blocks = (*source.structure.blocks, ())
    longer = replace(source, structure=replace(source.structure, blocks=blocks))
    with pytest.raises(
        SourceError, match="expected a list of 3 decoder layers in Qwen2ForCausalLM, found none"
    ):
        LayerRunner(longer, CPU)


@pytest.mark.parametrize(
    ("architecture", "model_type", "drop"),
    [
        ("Qwen2Model", "qwen2", ("head_dim",)),
        # Its layers get the embeddings of relative positions.
        ("MPNetModel", "mpnet", ("head_dim", "num_key_value_heads")),
    ],
)
def test_a_model_without_a_head_runs_its_layers_only(
    architecture: str, model_type: str, drop: tuple[str, ...], tmp_path: Path
) -> None:
    model = build_any_model(architecture, model_type, drop)
    source = write_any_model(model, tmp_path / "model")
    runner, store = LayerRunner(source, CPU), ActivationStore()
    samples = Samples.embedded(runner, store, token_ids(), 3)
    for index in range(source.num_layers):
        samples = samples.run(runner.layer(index, source.read(source.names_of_layer(index))), store, 3)
    with torch.no_grad():
        assert torch.equal(runner.outer.normed(whole(samples)), model(token_ids()).last_hidden_state)
    with pytest.raises(SourceError, match="expected a model with a language-model head"):
        _ = runner.outer.vocabulary
