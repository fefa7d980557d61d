"""config.json of GGUF files: the model computes what the original computes, or is refused."""

import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bwla_converter.source.families import FAMILIES
from bwla_converter.source.gguf_config import make_config
from bwla_converter.source.gguf_file import open_gguf
from bwla_converter.source.gguf_folder import write_folder
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import read_json
from gguf_models import finish, tiny, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.75,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}

NAMES = [family.name for family in FAMILIES if family.gguf]
MODELS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
    ("Llama", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
    ("Llama", {"head_dim": 16, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    ("Qwen2", {"rope_parameters": YARN}),
    ("Qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}}),
    ("Gemma 2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}),
    ("Gemma 3", {"rope_parameters": GEMMA3_ROPE}),
    (
        "Phi-3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 32,
            "sliding_window": 9,
            "head_dim": 16,
        },
    ),
]


def llama(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = make_config(open_gguf(file)).to_dict()
    return config


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "settings"), MODELS, ids=[f"{number} {model[0]}" for number, model in enumerate(MODELS)]
)
def test_the_model_computes_what_the_original_computes(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    model = tiny(family, **settings)
    write_folder(write_gguf(tmp_path / "model.gguf", model), tmp_path / "folder")
    copy = AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", dtype=torch.float32, attn_implementation="eager"
    )
    tokens = (
        torch.arange(40).view(1, 40) * 7 % 96
    )  # longer than the sliding windows and the original contexts
    expected = model(tokens).logits
    torch.testing.assert_close(copy.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("family", NAMES)
def test_transformers_reads_the_same_settings_as_far_as_it_reads_them(make_gguf, family: str) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        if family not in ("Llama", "Mistral"):  # whose files have it anyway
            writer.add_vocab_size(96)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(3)

    file = make_gguf(family, extra=extra)
    read = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_diff_dict()
    found = llama(file)
    not_read = {"architectures", "rope_parameters", "layer_types", "query_pre_attn_scalar"}
    not_read |= {"head_dim"} if family in ("Qwen2", "Qwen3", "Phi-3") else set()
    for name in read.keys() - not_read - {"transformers_version", "_model_name_or_path", "rms_norm_eps"}:
        assert found[name] == read[name], name
    assert found["rms_norm_eps"] == pytest.approx(read["rms_norm_eps"])


def test_floats_are_as_short_as_in_the_original(tmp_path: Path) -> None:
    config = llama(write_gguf(tmp_path / "model.gguf", tiny("Llama", rms_norm_eps=1e-5)))
    assert config["rms_norm_eps"] == 1e-5


def test_the_large_gemmas_scale_attention_by_another_width(tmp_path: Path) -> None:
    assert llama(write_gguf(tmp_path / "small.gguf", tiny("Gemma 2")))["query_pre_attn_scalar"] == 32
    large = tiny("Gemma 2", num_hidden_layers=46)
    assert llama(write_gguf(tmp_path / "large.gguf", large))["query_pre_attn_scalar"] == 16


def test_gemma_3_has_full_attention_in_every_sixth_layer(tmp_path: Path) -> None:
    file = open_gguf(write_gguf(tmp_path / "model.gguf", tiny("Gemma 3")))
    metadata = {key: value for key, value in file.metadata.items() if not key.endswith("_pattern")}
    types = make_config(
        type(file)(file.path, metadata | {"gemma3.block_count": 12}, file.tensors)
    ).layer_types
    assert [index for index, kind in enumerate(types) if kind == "full_attention"] == [5, 11]


@pytest.mark.parametrize(
    ("family", "architecture"), [("Mistral", "LlamaForCausalLM"), ("Gemma 3", "Gemma3ForCausalLM")]
)
def test_the_architecture_follows_from_that_of_llama_cpp(
    make_gguf, tmp_path: Path, family: str, architecture: str
) -> None:
    write_folder(make_gguf(family), tmp_path / "folder")
    assert read_json(tmp_path / "folder" / "config.json")["architectures"] == [architecture]


def refused(file: Path, *sentences: str) -> None:
    with pytest.raises(SourceError) as error:
        make_config(open_gguf(file))
    for sentence in sentences:
        assert sentence in str(error.value)


def named(path: Path, architecture: str) -> Path:
    """Write a file of an architecture that has only an embedding."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    finish(writer)
    return path


def test_an_unknown_architecture(tmp_path: Path) -> None:
    refused(
        named(tmp_path / "model.gguf", "rwkv7"), "found the architecture rwkv7, expected one of llama, qwen2"
    )


def test_a_mixture_of_experts(make_gguf) -> None:
    refused(make_gguf("Llama", extra=lambda writer: writer.add_expert_count(8)), "is a mixture of experts")


def test_factors_of_another_rope_scaling(make_gguf) -> None:
    factors = np.linspace(1, 9, 16, dtype=np.float32)
    refused(
        make_gguf("Llama", changes={"rope_freqs.weight": factors}), "rope_freqs.weight: expected the factors"
    )


def test_an_unknown_rope_scaling(make_gguf) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "spiral")

    refused(make_gguf("Llama", extra=extra), "found the RoPE scaling spiral with factor None")


def test_a_yarn_scaling_that_transformers_lacks(tmp_path: Path) -> None:
    model = tiny("Qwen2", rope_parameters=YARN)
    path = write_gguf(
        tmp_path / "model.gguf", model, extra=lambda writer: writer.add_rope_scaling_yarn_ext_factor(0.5)
    )
    refused(path, "its YaRN scaling has settings that transformers lacks")


def test_long_factors_without_short_ones(make_gguf) -> None:
    factors = np.ones(16, dtype=np.float32)
    refused(
        make_gguf("Phi-3", changes={"rope_factors_long.weight": factors}),
        "expected rope_factors_short.weight in float32, found none",
    )


def test_layers_with_different_numbers_of_heads(make_gguf) -> None:
    file = open_gguf(make_gguf())
    metadata = {**file.metadata, "qwen3.attention.head_count_kv": [1, 2]}
    with pytest.raises(SourceError, match="expected one number of heads for all layers"):
        make_config(type(file)(file.path, metadata, file.tensors))


@pytest.mark.parametrize("key", ["context_length", "block_count", "attention.layer_norm_rms_epsilon"])
def test_a_missing_setting(make_gguf, key: str) -> None:
    file = open_gguf(make_gguf())
    metadata = {name: value for name, value in file.metadata.items() if name != f"qwen3.{key}"}
    with pytest.raises(SourceError, match=f"expected qwen3.{key} in its metadata, found none"):
        make_config(type(file)(file.path, metadata, file.tensors))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("block_count", 10**9, "expected 1 to 10000 layers in its metadata, found 1000000000"),
        ("embedding_length", "wide", "transformers cannot use the settings in its metadata"),
        ("rope.dimension_count", 8, "expected RoPE of all 32 dimensions of a head, found that of 8"),
        ("context_length", "long", "transformers cannot use the settings in its metadata"),
    ],
)
def test_a_damaged_setting(make_gguf, key: str, value: object, sentence: str) -> None:
    file = open_gguf(make_gguf())
    with pytest.raises(SourceError, match=sentence):
        make_config(type(file)(file.path, {**file.metadata, f"qwen3.{key}": value}, file.tensors))


def test_a_file_without_an_embedding(make_gguf) -> None:
    refused(
        make_gguf(changes={"token_embd.weight": None}), "expected the tensor token_embd.weight, found none"
    )


def test_settings_that_are_not_used_are_named(make_gguf, caplog: pytest.LogCaptureFixture) -> None:
    file = make_gguf(extra=lambda writer: writer.add_uint32("qwen3.speed_of_light", 299_792_458))
    with caplog.at_level(logging.WARNING):
        make_config(open_gguf(file))
    assert [record.getMessage() for record in caplog.records] == [
        "model.gguf: qwen3.speed_of_light is not used"
    ]
