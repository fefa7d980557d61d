"""What llama.cpp's converter makes of tensors.

Each function takes the name of a tensor as it is stored, its values and the configuration, and returns the names that
are looked up in gguf's table (or, with "blk.", those in the file) with their values.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from gguf_models import permute
from torch import Tensor

Changed = Iterable[tuple[str, Tensor]]


def add_one(name: str, tensor: Tensor, config: Any) -> Changed:
    """Store norms that multiply by 1 + weight as what they multiply by."""
    return [(name, tensor + 1 if name.endswith("norm.weight") else tensor)]


def llama(name: str, tensor: Tensor, config: Any) -> Changed:
    """Permute the rows of q_proj and k_proj."""
    if ".q_proj." in name:
        tensor = permute(tensor, config.num_attention_heads)
    if ".k_proj." in name:
        tensor = permute(tensor, config.num_key_value_heads)
    return [(name, tensor)]


def bloom(name: str, tensor: Tensor, config: Any) -> Changed:
    """Store all queries, then all keys, then all values."""
    if "query_key_value" in name:
        heads = tensor.reshape(config.n_head, 3, -1, *tensor.shape[1:])
        tensor = torch.cat([heads[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)])
    return [(name.removeprefix("transformer."), tensor)]


def falcon(name: str, tensor: Tensor, config: Any) -> Changed:
    """Store all queries, then all keys, then all values."""
    if "query_key_value" in name:
        kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
        head_dim = config.hidden_size // config.num_attention_heads
        groups = tensor.view(
            kv_heads, config.num_attention_heads // kv_heads + 2, head_dim, *tensor.shape[1:]
        )
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        tensor = torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])
    return [(name, tensor)]


def lfm2(name: str, tensor: Tensor, config: Any) -> Changed:
    """Store convolutions as matrices."""
    return [(name, tensor.squeeze(1) if "conv.conv" in name else tensor)]


def minimax(name: str, tensor: Tensor, config: Any) -> Changed:
    """Give the bias of the router the suffix of a bias."""
    return [(name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor)]


def gpt_oss(name: str, tensor: Tensor, config: Any) -> Changed:
    """Divide gate and up, and transpose the experts' weights."""
    if name.endswith("sinks"):
        return [(f"{name}.weight", tensor)]
    name = re.sub(r"proj_bias$", "proj.bias", name)
    if ".experts." in name and not name.endswith("bias"):
        name, tensor = f"{name}.weight", tensor.transpose(1, 2)
    if "gate_up_proj" in name:
        axes = (slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))
        gate, up = (tensor[axis] for axis in axes)
        return [(name.replace("gate_up", "gate"), gate), (name.replace("gate_up", "up"), up)]
    return [(name, tensor)]


def gemma4(name: str, tensor: Tensor, config: Any) -> Changed:
    """Give parameters of their own the suffix of a weight."""
    layer = re.search(r"\.(\d+)\.", name)
    if layer and name.endswith("router.scale"):
        return [(f"blk.{layer[1]}.ffn_gate_inp.scale", tensor)]
    if layer and name.endswith("per_expert_scale"):
        return [(f"blk.{layer[1]}.ffn_down_exps.scale", tensor)]
    return [(name if name.endswith(".weight") else f"{name}.weight", tensor)]


def qwen35(name: str, tensor: Tensor, config: Any) -> Changed:
    """Store decays instead of their logarithms, and value heads in the order in which ggml repeats key heads."""
    keys, rows = config.linear_num_key_heads, 2 * config.linear_num_key_heads * config.linear_key_head_dim

    def tile(values: Tensor) -> Tensor:
        heads = values.reshape(keys, config.linear_num_value_heads // keys, -1, *values.shape[1:])
        return heads.transpose(0, 1).reshape(values.shape)

    if "in_proj_qkv." in name or "conv1d" in name:
        tensor = torch.cat([tensor[:rows], tile(tensor[rows:])]).squeeze()
    elif any(part in name for part in ("in_proj_z", "in_proj_a", "in_proj_b", "dt_bias", "A_log")):
        tensor = tile(tensor)
    elif "out_proj" in name:
        tensor = tile(tensor.T).T
    if name.endswith("A_log"):
        tensor = -torch.exp(tensor)
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        tensor = tensor + 1
    return [(name.replace(".dt_bias", ".dt_proj.bias"), tensor)]
