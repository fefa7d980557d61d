"""Decoders in classes that name, count or hide their parts differently, and what is refused because it has none."""

import logging
from pathlib import Path

import pytest
import transformers
from bwla_converter.checkpoint.dummy import config_source
from bwla_kernels.errors import SourceError
from decoder_configs import write_config
from transformers import PretrainedConfig
from transformers.utils import is_timm_available

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}


def written(folder: Path, config: PretrainedConfig, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (transformers.ModernBertDecoderConfig, "ModernBertDecoderForCausalLM"),
        (transformers.ModernBertConfig, "ModernBertForMaskedLM"),
    ],
)
def test_a_head_that_is_called_decoder(
    config: type[PretrainedConfig], architecture: str, tmp_path: Path
) -> None:
    structure = config_source(
        written(tmp_path, config(**SIZES, num_attention_heads=2, pad_token_id=0), architecture)
    ).structure
    assert structure.layers == "model.layers"
    assert [len(block) for block in structure.blocks] == [4, 4]


def test_a_model_that_does_not_say_whether_its_head_is_tied(tmp_path: Path) -> None:
    source = config_source(write_config(tmp_path, "embedding_gemma2"))
    assert not source.tied_head
    assert not source.structure.has_head
    assert source.structure.layers == "language_model.layers"


def test_linears_that_vllm_fuses_by_their_weights_alone_stay(tmp_path: Path) -> None:
    structure = config_source(write_config(tmp_path, "embedding_gemma2")).structure
    quantized = {name.rpartition(".")[2] for _, name in structure.linears()}
    assert quantized == {"o_proj", "down_proj", "per_layer_input_gate", "per_layer_projection"}
    assert structure.kept["self_attn.q_proj"] == "vLLM's class fuses it by the name of its weight alone"


def test_layers_that_are_counted_by_another_setting_are_found(tmp_path: Path) -> None:
    longcat = transformers.LongcatFlashConfig(
        hidden_size=64, num_layers=2, vocab_size=96, num_attention_heads=2, n_routed_experts=4, moe_topk=2
    )
    assert longcat.num_hidden_layers == 4
    # They are found, and run up to the experts.
    with pytest.raises(
        SourceError, match="LongcatFlashForCausalLM to run .*decisions by the values of tensors"
    ):
        config_source(written(tmp_path, longcat, "LongcatFlashForCausalLM"))


def test_code_that_needs_values_is_refused_in_words_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {**SIZES, "kv_channels": 32, "num_key_value_heads": 1}
    folder = written(tmp_path / "values", transformers.JetMoeConfig(**sizes), "JetMoeForCausalLM")
    with pytest.raises(
        SourceError, match=r"found code that takes decisions by the values of tensors: this model"
    ):
        config_source(folder)
    # torch logs the traceback of an operation that cannot take its arguments.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 3]}
    config = transformers.Glm4vConfig()
    config.get_text_config().num_hidden_layers = 2
    config.get_text_config().rope_parameters = rope
    with pytest.raises(SourceError, match=r"found RuntimeError \(.*\): this model is not supported"):
        config_source(written(tmp_path / "shapes", config, "Glm4vForConditionalGeneration"))
    assert not caplog.records
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


def test_layers_that_run_several_times_are_refused(tmp_path: Path) -> None:
    albert = transformers.AlbertConfig(**SIZES, embedding_size=64, num_attention_heads=2)
    with pytest.raises(
        SourceError, match="list of num_hidden_layers, 2, decoder layers in AlbertModel, found none"
    ):
        config_source(written(tmp_path, albert, "AlbertModel"))


def test_several_models_in_one_are_refused(tmp_path: Path) -> None:
    omni = transformers.Qwen2_5OmniConfig()
    with pytest.raises(
        SourceError, match="one embedding of token ids in Qwen2_5OmniForConditionalGeneration"
    ):
        config_source(written(tmp_path, omni, "Qwen2_5OmniForConditionalGeneration"))


@pytest.mark.skipif(is_timm_available(), reason="timm is installed")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """Gemma 3n's vision tower is timm's."""
    folder = written(tmp_path, transformers.Gemma3nConfig(), "Gemma3nForConditionalGeneration")
    with pytest.raises(SourceError, match=r"Gemma3nForConditionalGeneration needs, .*timm.*: install it"):
        config_source(folder)
