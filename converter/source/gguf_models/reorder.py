"""What llama.cpp's converter changes about the values of tensors, undone.

transformers' own tensor processors do the same for some of these architectures, but on whole tensors in float32, and
they lack the fused query, key and value of Falcon, and the experts of gpt-oss. Each function here takes one tensor,
float32 if it has one dimension and bfloat16 otherwise, with the configuration of the model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Undo the permutation of rows that llama.cpp applies to q_proj and k_proj of Llama models.

    llama.cpp rotates pairs of neighbouring outputs of a head; transformers rotates an output of the head's first half
    together with one of its second half.

    Args:
        tensor: a weight [heads * head_dim, K] or a bias [heads * head_dim].
        heads: number of heads.
    """
    pairs = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, pairs, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def unpermute_queries(tensor: Tensor, config: Any) -> Tensor:
    """Undo the permutation of q_proj."""
    return unpermute(tensor, config.num_attention_heads)


def unpermute_keys(tensor: Tensor, config: Any) -> Tensor:
    """Undo the permutation of k_proj."""
    return unpermute(tensor, config.num_key_value_heads)


def subtract_one(tensor: Tensor, config: Any) -> Tensor:
    """Undo the addition of 1 to the weights of norms that multiply by 1 + weight."""
    return tensor - 1


def log_of_negative(tensor: Tensor, config: Any) -> Tensor:
    """Return A_log from -exp(A_log)."""
    return torch.log(-tensor)


def interleave_bloom(tensor: Tensor, config: Any) -> Tensor:
    """Return BLOOM's query_key_value, whose rows are those of the first head's q, k and v, then of the next one's.

    Args:
        tensor: the rows of q of all heads, then those of k and v: a weight [3 * hidden, hidden] or a bias [3 * hidden].
        config: the configuration.
    """
    parts = tensor.reshape(3, config.num_attention_heads, -1, *tensor.shape[1:])
    return parts.transpose(0, 1).reshape(tensor.shape)


def interleave_falcon(tensor: Tensor, config: Any) -> Tensor:
    """Return Falcon's query_key_value: for each head of keys, the rows of its queries, its key and its value.

    Args:
        tensor: the rows of q of all heads, then those of k and v: a weight [(heads + 2 * kv_heads) * head_dim, hidden],
            or a bias of as many values.
        config: the configuration.
    """
    heads, kv_heads, rest = config.num_attention_heads, config.num_kv_heads, tensor.shape[1:]
    head_dim = tensor.shape[0] // (heads + 2 * kv_heads)
    rows = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    parts = [part.reshape(kv_heads, -1, head_dim, *rest) for part in tensor.split(rows)]
    return torch.cat(parts, dim=1).reshape(tensor.shape)


def group_value_heads(tensor: Tensor, config: Any) -> Tensor:
    """Return rows of value heads in transformers' order: those of the first key head, then those of the next one.

    llama.cpp stores the first value head of every key head, then the second ones.

    Args:
        tensor: a tensor with the same number of rows for each value head of linear attention.
        config: the configuration.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    rows = tensor.reshape(values // keys, keys, -1, *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(tensor.shape)


def group_values_of_qkv(tensor: Tensor, config: Any) -> Tensor:
    """Return fused queries, keys and values, or their convolution, with the value heads in transformers' order."""
    first = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat([tensor[:first], group_value_heads(tensor[first:], config)])


def group_value_inputs(tensor: Tensor, config: Any) -> Tensor:
    """Return a linear that reads the value heads, with its columns in transformers' order."""
    return group_value_heads(tensor.T, config).T


def group_decays(tensor: Tensor, config: Any) -> Tensor:
    """Return A_log of linear attention."""
    return group_value_heads(log_of_negative(tensor, config), config)


def transpose_experts(tensors: Sequence[Tensor]) -> Tensor:
    """Return the weights of experts as gpt-oss stores them.

    Args:
        tensors: one weight of all experts [E, N, K].

    Returns: shape [E, K, N].
    """
    return tensors[0].transpose(1, 2)


def interleave_gate_up(tensors: Sequence[Tensor]) -> Tensor:
    """Return gpt-oss's gate_up_proj or its bias, in whose last dimension outputs of gate and up alternate.

    Args:
        tensors: gate and up of all experts, each a weight [E, N, K] or a bias [E, N].

    Returns: shape [E, K, 2 N] or [E, 2 N].
    """
    gate, up = (tensor.transpose(1, -1) if tensor.dim() == 3 else tensor for tensor in tensors)
    return torch.stack([gate, up], dim=-1).flatten(-2)


def join_gate_up(tensors: Sequence[Tensor]) -> Tensor:
    """Return gate and up of all experts [E, N, K] as one tensor [E, 2 N, K]."""
    return torch.cat(list(tensors), dim=1)
