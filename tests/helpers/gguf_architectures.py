"""Tiny models of the architectures that are read from GGUF files, written as llama.cpp's converter writes them.

`gguf_models` has the families that most tests use. Names, values and settings follow llama.cpp's converter; files of
the same models that it wrote itself (the version in llama-cpp-python 0.3.36) were read with the same result, apart from
StableLM with norms of heads, which that version fails to write.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from bwla_kernels.format.files import read_folder, read_tensors
from gguf_changes import Changed, add_one, bloom, falcon, gemma4, gpt_oss, lfm2, llama, minimax, qwen35
from gguf_models import finish
from gguf_settings import (
    Keys,
    common_keys,
    expert_keys,
    falcon_keys,
    gemma4_keys,
    gpt_oss_keys,
    lfm2_keys,
    minimax_keys,
    partial_keys,
    qwen35_keys,
)
from torch import Tensor

from benchmarks.coverage.build import build
from benchmarks.coverage.cases import CASES

TWO_KINDS = ["sliding_attention", "full_attention"]
NUMBERED = re.compile(r"(.*\.(?:experts|[qk]_layernorm\.norms))\.\d+(\..*)")
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
VALUE_HEADS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "full_attention_interval": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
SHARED = {"num_hidden_layers": 4, "layer_types": TWO_KINDS * 2, "global_head_dim": 64}


def theta(value: float, **more: Any) -> dict[str, Any]:
    """Return RoPE parameters with another base than the class's default."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value, **more}}


@dataclass(frozen=True)
class GGUFCase:
    """A tiny model and what llama.cpp's converter makes of it.

    Attributes:
        gguf: llama.cpp's name of the architecture.
        case: name in `benchmarks.coverage` of the model.
        settings: what differs from that case, so that no setting has the default of its class.
        change: returns the names and values that the converter gives to a tensor.
        keys: returns the settings that the converter writes besides the common ones.
        lost: names in config.json that the file does not record and nothing computes with.
    """

    gguf: str
    case: str
    settings: Mapping[str, Any]
    change: Callable[[str, Tensor, Any], Changed] = lambda name, tensor, config: [(name, tensor)]
    keys: Callable[[Any], Keys] = lambda config: {}
    lost: frozenset[str] = frozenset()


_FALCON_LOST = frozenset({"intermediate_size", "max_position_embeddings", "multi_query"})
INTERVAL = frozenset({"full_attention_interval"})
"""The layers' kinds say it."""
_GEMMA4_WIDE = {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "final_logit_softcapping": 20.0,
    **SHARED,
}

GGUF_CASES: Mapping[str, GGUFCase] = {
    "llama": GGUFCase(
        "llama", "llama", {**theta(5e5), "rms_norm_eps": 1e-4}, llama, lambda config: {"vocab_size": 256}
    ),
    "qwen2moe": GGUFCase(
        "qwen2moe",
        "qwen2_moe",
        {**theta(1e6), "rms_norm_eps": 1e-4, "shared_expert_intermediate_size": 96},
        keys=expert_keys,
    ),
    "qwen3moe": GGUFCase("qwen3moe", "qwen3_moe", {**theta(1e6), "norm_topk_prob": True}, keys=expert_keys),
    "gpt-oss": GGUFCase(
        "gpt-oss",
        "gpt_oss",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e5,
                "factor": 4.0,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            }
        },
        gpt_oss,
        gpt_oss_keys,
    ),
    "lfm2": GGUFCase(
        "lfm2",
        "lfm2",
        {**HEADS, "norm_eps": 1e-4, "conv_L_cache": 4, "num_hidden_layers": 3, **theta(5e5)}
        | {"layer_types": ["conv", "full_attention", "conv"]},
        lfm2,
        lfm2_keys,
        # Settings of older versions, which transformers' class does not read.
        frozenset({"conv_dim_out", "block_mlp_init_scale", "block_norm_eps"}),
    ),
    "stablelm": GGUFCase(
        "stablelm",
        "stablelm",
        {**HEADS, "use_qkv_bias": True, **theta(1e4, partial_rotary_factor=0.5)},
        keys=partial_keys,
    ),
    "stablelm with norms of heads": GGUFCase(
        "stablelm",
        "stablelm",
        {
            **HEADS,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            **theta(1e4, partial_rotary_factor=0.5),
        },
        keys=partial_keys,
    ),
    "starcoder2": GGUFCase("starcoder2", "starcoder2", {**HEADS, **theta(1e6), "norm_epsilon": 1e-4}),
    "nemotron": GGUFCase(
        "nemotron",
        "nemotron",
        {**HEADS, "head_dim": 16, "norm_eps": 1e-4, **theta(5e3, partial_rotary_factor=0.5)},
        add_one,
        lambda config: {
            **partial_keys(config),
            "attention.layer_norm_epsilon": 1e-4,
            "rope.scaling.type": "none",
        },
    ),
    "falcon 7B": GGUFCase(
        "falcon",
        "falcon",
        {
            "num_attention_heads": 4,
            "num_kv_heads": 1,
            "new_decoder_architecture": False,
            "layer_norm_epsilon": 1e-4,
        },
        falcon,
        falcon_keys,
        _FALCON_LOST,
    ),
    "falcon 40B": GGUFCase(
        "falcon", "falcon", {"num_attention_heads": 4, "num_kv_heads": 2}, falcon, falcon_keys, _FALCON_LOST
    ),
    "falcon 11B": GGUFCase(
        "falcon",
        "falcon",
        {"num_attention_heads": 4, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        falcon,
        falcon_keys,
        _FALCON_LOST,
    ),
    "bloom": GGUFCase(
        "bloom",
        "bloom",
        {"n_head": 4, "layer_norm_epsilon": 1e-4, "seq_length": 64},
        bloom,
        lambda config: {"context_length": 64, "feed_forward_length": 4 * config.hidden_size},
        frozenset({"intermediate_size", "max_position_embeddings"}),
    ),
    "minimax-m2": GGUFCase(
        "minimax-m2",
        "minimax_m2",
        {"rotary_dim": 16, **theta(1e6, partial_rotary_factor=0.5)},
        minimax,
        minimax_keys,
    ),
    "gemma4": GGUFCase("gemma4", "gemma4_text", {"sliding_window": 7}, gemma4, gemma4_keys),
    "gemma4 E2B": GGUFCase(
        "gemma4",
        "gemma4_text",
        {**SHARED, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
        gemma4,
        gemma4_keys,
    ),
    "gemma4 31B": GGUFCase("gemma4", "gemma4_text", _GEMMA4_WIDE, gemma4, gemma4_keys),
    "gemma4 26B": GGUFCase(
        "gemma4",
        "gemma4_text",
        {
            **_GEMMA4_WIDE,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 96,
        },
        gemma4,
        gemma4_keys,
    ),
    "qwen35": GGUFCase("qwen35", "qwen3_5_text", VALUE_HEADS, qwen35, qwen35_keys, INTERVAL),
    "qwen35moe": GGUFCase(
        "qwen35moe",
        "qwen3_5_moe_text",
        {**VALUE_HEADS, "moe_intermediate_size": 96},
        qwen35,
        qwen35_keys,
        INTERVAL,
    ),
}
"""The models by name; those of `gguf_models` are not repeated, apart from Llama."""


def write_pair(
    folder: Path,
    name: str,
    quantization: str = "F32",
    edit: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = lambda tensors: tensors,
) -> tuple[Path, Path]:
    """Write a model as a Hugging Face folder and as a GGUF file; return both.

    Args:
        folder: where to write them.
        name: a name in `GGUF_CASES`.
        quantization: type of the matrices whose rows its blocks divide.
        edit: changes the tensors in the GGUF file.
    """
    case = GGUF_CASES[name]
    entry = CASES[case.case]
    model = build(replace(entry, settings={**entry.settings, **case.settings}, dtype="float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    original = folder / "original"
    model.save_pretrained(original)
    tensors = edit(named_tensors(original, case, model.config))
    write_case(folder / "model.gguf", case, model.config, tensors, quantization)
    return original, folder / "model.gguf"


def write_case(
    path: Path, case: GGUFCase, config: Any, tensors: Mapping[str, Tensor], quantization: str
) -> None:
    """Write a GGUF file with tensors as llama.cpp's converter stores them."""
    writer = gguf.GGUFWriter(path, case.gguf)
    for key, value in {**common_keys(config), **case.keys(config)}.items():
        add_key(writer, f"{case.gguf}.{key}", value)
    # The vocabulary without the kind of tokenizer: transformers takes its size from it.
    add_key(writer, "tokenizer.ggml.tokens", [f"t{index}" for index in range(config.vocab_size)])
    for name, tensor in tensors.items():
        divides = tensor.dim() > 1 and tensor.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType[quantization if divides else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
    finish(writer)


def named_tensors(original: Path, case: GGUFCase, config: Any) -> dict[str, Tensor]:
    """Return the tensors of a folder as llama.cpp's converter stores them."""
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == case.gguf)
    table = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    entries = read_folder(original)
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(read_tensors(original, entries, list(entries)).items(), key=natural):
        match = NUMBERED.fullmatch(name)
        merged = match[1].removesuffix(".norms") + match[2] if match else name
        stacks.setdefault(merged, []).append(tensor.float())
        assert match or len(stacks[merged]) == 1
    found: dict[str, Tensor] = {}
    for name, tensors in stacks.items():
        tensor = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
        for changed, value in case.change(name, tensor, config):
            stored = (
                changed
                if changed.startswith("blk.")
                else table.get_name(changed, try_suffixes=(".weight", ".bias"))
            )
            assert stored is not None, changed
            found[stored] = value
    if case.gguf == "gemma4":
        rope = config.rope_parameters["full_attention"]
        pairs = config.per_layer_config[config.layer_types.index("full_attention")].head_dim // 2
        rotated = int(pairs * rope["partial_rotary_factor"])
        found["rope_freqs.weight"] = torch.tensor([1.0] * rotated + [1e30] * (pairs - rotated))
    return found


def natural(item: tuple[str, Tensor]) -> list[Any]:
    """Return a key that sorts numbers in names by their values."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", item[0])]


def add_key(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Add one setting in the type that llama.cpp uses for such a value."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
