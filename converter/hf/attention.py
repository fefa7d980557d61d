"""Attention of transformers' models in bfloat16, for models whose other activations are float32."""

from typing import Any

import torch
from bwla_kernels.precision import has_fast_bfloat16
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "bwla_bfloat16_sdpa"
"""Name of the implementation, for `attn_implementation`."""


def attention_implementation(device: torch.device) -> str:
    """Return the `attn_implementation` for float32 models on `device`: bfloat16 where that is several times faster."""
    return NAME if has_fast_bfloat16(device) else "sdpa"


def bfloat16_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention in bfloat16; arguments as in transformers' `sdpa_attention_forward`.

    Returns: the output [S, T, heads, head size] in the dtype of `query`, and None instead of the attention weights.
    """
    rounded = (part.to(torch.bfloat16) for part in (query, key, value))
    output, _ = sdpa_attention_forward(module, *rounded, attention_mask, **kwargs)
    return output.to(query.dtype), None


AttentionInterface.register(NAME, bfloat16_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
