"""Settings of mixtures of experts.

transformers' reader leaves the width of the experts at its default, which is that of one published model; the experts'
tensors say it.
"""

from typing import Any

from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.gguf_models.common import read_common
from bwla_converter.source.gguf_models.keys import Keys
from bwla_converter.source.gguf_models.rope import read_rope
from bwla_kernels.errors import SourceError

GATING = {1: "softmax", 2: "sigmoid"}
"""`scoring_func` in config.json by llama.cpp's number of the function."""


def qwen2_moe(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Qwen1.5-MoE and Qwen2-57B-A14B."""
    return {
        **read_common(file, keys, "qwen2_moe"),
        "rope_parameters": read_rope(file, keys),
        "moe_intermediate_size": expert_width(file),
        "shared_expert_intermediate_size": rows_of(file, "blk.0.ffn_gate_shexp.weight"),
    }


def qwen3_moe(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of Qwen3's mixtures of experts."""
    return {
        **read_common(file, keys, "qwen3_moe"),
        "rope_parameters": read_rope(file, keys),
        "moe_intermediate_size": expert_width(file),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def gpt_oss(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of gpt-oss.

    transformers' reader takes the lengths of the RoPE keys' names for their values, and looks for the window under
    another name.
    """
    # Two settings that no file records, the same in all gpt-oss models: YaRN's bounds are not rounded, and every other
    # layer has full attention. llama.cpp has the second built in.
    return {
        **read_common(file, keys, "gpt_oss"),
        "rope_parameters": {**read_rope(file, keys, 150_000.0), "truncate": False},
        "sliding_window": keys.need("attention.sliding_window"),
        "intermediate_size": expert_width(file),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def minimax_m2(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    """Return the settings of MiniMax M2."""
    common = read_common(file, keys, "minimax_m2", partial=True)
    gating = keys.get("expert_gating_func", 2)
    if gating not in GATING:
        raise SourceError(
            f"{file.path}: found the function {gating} for choosing experts, expected one of "
            f"{', '.join(GATING.values())}: use another model"
        )
    head_dim = common["head_dim"]
    rotated = keys.get("rope.dimension_count", head_dim)
    return {
        **common,
        "rope_parameters": {**read_rope(file, keys), "partial_rotary_factor": rotated / head_dim},
        "rotary_dim": rotated,  # by this name vLLM's class knows it
        "scoring_func": GATING[gating],
        "intermediate_size": expert_width(file),
    }


def expert_width(file: GGUFFile) -> int:
    """Return the width of a routed expert.

    Raises:
        SourceError: the first layer has no experts.
    """
    return rows_of(file, "blk.0.ffn_down_exps.weight", axis=-1)


def rows_of(file: GGUFFile, name: str, axis: int = 0) -> int:
    """Return a size of a tensor in torch's order.

    Raises:
        SourceError: the file does not have the tensor.
    """
    if name not in file.tensors:
        raise SourceError(f"{file.path}: expected the tensor {name}, found none: get the file again")
    return file.shape(name)[axis]
