"""Checkpoints of architectures with other names, fused layers, experts or several kinds of decoder layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from any_decoder import write_checkpoint, write_source
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_kernels.errors import FormatError
from bwla_kernels.format.files import read_folder, read_tensors
from bwla_kernels.format.schema import head_args
from bwla_kernels.head import quantize_head
from greedy import answer
from safetensors.torch import save_file
from torch import Tensor

from bwla_vllm.checks import changed_sizes, check_checkpoint
from bwla_vllm.errors import StartError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 255,
    "pad_token_id": 0,
    "dtype": "float32",
}
TOWER = {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # vLLM's class says that the files hold gate_proj and up_proj; they hold gate_up_proj.
    "GLM-4": ("Glm4ForCausalLM", "glm4", {"head_dim": 32}),
    # vLLM's class does not say what it fuses.
    "StableLM": ("StableLmForCausalLM", "stablelm", {}),
    # transformers merges the experts, and calls the module differently.
    "Mixtral": ("MixtralForCausalLM", "mixtral", {"num_local_experts": 4, "head_dim": 32}),
    # Decoder layers of two kinds.
    "LFM2": (
        "Lfm2ForCausalLM",
        "lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "block_dim": 64,
            "conv_dim": 64,
        },
    ),
    # A vision tower, and a config and names of its own for the language model.
    "Qwen2.5-VL": (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        {
            "text_config": {**SIZES, "rope_parameters": ROPE, "model_type": "qwen2_5_vl_text"},
            "vision_config": {**TOWER, "fullatt_block_indexes": [0], "patch_size": 14},
            "tie_word_embeddings": False,
        },
    ),
}


LFM2_MLP = [f"feed_forward.{name}" for name in ("w1", "w2", "w3")]
LFM2_ATTENTION = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]


def write_case(case: str, folder: Path) -> Path:
    class_name, model_type, changes = CASES[case]
    sizes = {} if "text_config" in changes else SIZES
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **changes})
    write_source(folder / "source", getattr(transformers, class_name), config)
    write_checkpoint(folder / "source", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints by case; leave them as they are."""
    written: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in written:
            written[case] = write_case(case, tmp_path_factory.mktemp("case"))
        return written[case]

    return get


def check(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert changed_sizes(folder, transformers.AutoConfig.from_pretrained(folder), config["config"]) is None
    return check_checkpoint(folder)


def changed(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], Any], **quantization: Any) -> Path:
    """Write a copy of a checkpoint with changed tensors and a changed `quantization_config`."""
    entries = read_folder(folder)
    tensors = read_tensors(folder, entries, list(entries))
    change(tensors)
    out.mkdir()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(quantization)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("case", CASES)
def test_complete_checkpoints_pass(case: str, stored: Callable[[str], Path]) -> None:
    assert check(stored(case))


DAMAGE: dict[str, tuple[str, str, str]] = {
    "a norm of a hybrid": (
        "LFM2",
        "model.layers.1.operator_norm.weight",
        r"model.layers.1.operator_norm.weight is missing, expected shape \[64\]",
    ),
    "a linear that one kind of layer has": (
        "LFM2",
        "model.layers.0.conv.in_proj.weight_packed",
        r"model.layers.0.conv.in_proj.",
    ),
    "one expert": (
        "Mixtral",
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
        r"model.layers.1.block_sparse_moe.experts.2.w2.weight is missing, expected shape \[64, 128\]",
    ),
    "a router that transformers calls differently": (
        "Mixtral",
        "model.layers.1.block_sparse_moe.gate.weight",
        r"model.layers.1.block_sparse_moe.gate.weight is missing, expected shape \[4, 64\]",
    ),
    "a norm of a language model inside another": (
        "Qwen2.5-VL",
        "model.layers.0.input_layernorm.weight",
        r"model.layers.0.input_layernorm.weight is missing, expected shape \[64\]",
    ),
    "a part of the tower": (
        "Qwen2.5-VL",
        "visual.merger.mlp.0.weight",
        r"visual.merger.mlp.0.*is missing, expected",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_missing_tensors_are_named_as_stored(
    damage: str, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    case, name, sentence = DAMAGE[damage]
    folder = changed(stored(case), tmp_path / "damaged", lambda tensors: tensors.pop(name))
    with pytest.raises(FormatError, match=sentence):
        check(folder)


def remove_linear(name: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]

    return remove


def test_the_list_says_what_each_layer_has(stored: Callable[[str], Path], tmp_path: Path) -> None:
    folder = stored("LFM2")
    listed = json.loads((folder / "config.json").read_text())["quantization_config"]["tensors"]
    assert "model.layers.0.conv.in_proj.weight_packed" in listed
    assert "model.layers.1.self_attn.q_proj.weight_packed" in listed
    assert "model.layers.[0-1].feed_forward.w1.weight_packed" in listed
    name = "model.layers.0.conv.in_proj"
    damaged = changed(folder, tmp_path / "damaged", remove_linear(name))
    with pytest.raises(FormatError, match=rf"{name}.weight_packed is missing, expected shape"):
        check(damaged)


def test_a_checkpoint_without_a_list_is_checked_by_its_headers(
    stored: Callable[[str], Path], tmp_path: Path
) -> None:
    """Earlier versions listed the linears, where decoder layers differ."""
    kinds = [
        {"layers": "model.layers", "indices": [0], "names": ["conv.in_proj", "conv.out_proj", *LFM2_MLP]},
        {"layers": "model.layers", "indices": [1], "names": [*LFM2_ATTENTION, *LFM2_MLP]},
    ]
    older = {"tensors": None, "config": None, "linears": kinds}
    folder, name = stored("LFM2"), "model.layers.0.conv.in_proj"
    complete = changed(folder, tmp_path / "complete", lambda tensors: None, **older)
    assert check_checkpoint(complete) == check(folder)
    damaged = changed(folder, tmp_path / "damaged", remove_linear(name), **older)
    with pytest.raises(
        FormatError, match=rf"{name}.weight_packed is missing, although config.json lists it in linears"
    ):
        check_checkpoint(damaged)
    unlisted = changed(folder, tmp_path / "unlisted", lambda tensors: None, **{**older, "linears": kinds[:1]})
    with pytest.raises(FormatError, match=r"expected linears to list model.layers.1.*stored in one bit"):
        check_checkpoint(unlisted)


def test_a_weight_that_config_json_describes_as_quantized(
    stored: Callable[[str], Path], tmp_path: Path
) -> None:
    """A loader that has not seen the headers would wait for one-bit tensors."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.layers.0.self_attn.o_proj.weight"] = torch.zeros(64, 64)

    folder = changed(stored("StableLM"), tmp_path / "changed", add)
    with pytest.raises(
        FormatError, match=r"mtp.*o_proj.weight: expected one-bit tensors.*does not ignore it"
    ):
        check(folder)


@pytest.mark.parametrize("case", ["GLM-4", "StableLM", "Mixtral", "LFM2"])
def test_served_as_the_dequantized_model(
    case: str, stored: Callable[[str], Path], start: Callable[..., Any], tmp_path: Path
) -> None:
    write_dequantized(stored(case), tmp_path / "dequantized", "float32")
    tokens, tables = answer(start(stored(case), skip_tokenizer_init=True))
    wanted, expected = answer(start(tmp_path / "dequantized", skip_tokenizer_init=True))
    assert tokens == wanted
    for found, table in zip(tables, expected, strict=True):
        assert all(found[token] == pytest.approx(table[token], abs=1e-3) for token in found if token in table)


def test_a_class_without_an_8_bit_head_is_named_before_weights_are_read(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {**SIZES, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model("gpt_oss", **sizes)
    source = write_source(tmp_path / "source", transformers.GptOssForCausalLM, config)
    write_checkpoint(source, tmp_path / "plain")

    def quantize(tensors: dict[str, Tensor]) -> None:
        head = quantize_head(tensors.pop("lm_head.weight"))
        tensors.update({f"lm_head.{key}": tensor for key, tensor in head.items()})

    args = head_args().model_dump(
        mode="json", include={"num_bits", "type", "symmetric", "strategy", "dynamic"}
    )
    out = changed(tmp_path / "plain", tmp_path / "out", quantize, lm_head=args, tensors=None)
    with pytest.raises(
        StartError,
        match=r"lm_head: expected 16 bits, because vLLM's class GptOssForCausalLM .*--lm-head-bits 16",
    ):
        start(out, skip_tokenizer_init=True)
