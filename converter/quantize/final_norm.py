"""Refit the weight of the final norm in closed form, one least-squares scale per channel of the head's input.

The quantization error of the hidden states is noise to the head and makes it overconfident. The best scale of a noisy
channel y_hat for the original's y is E[y y_hat] / E[y_hat^2] (a Wiener filter with one coefficient per channel), which
is below 1 where there is noise. The norm's weight is stored unquantized anyway, so this costs no bits.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def fit_norm(norm: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the weight with which `norm` brings the quantized model's hidden states closest to the original's.

    Works for any norm that is linear in its weight: RMSNorm, Gemma's (1 + weight), LayerNorm with a bias.

    Args:
        norm: the original model's norm; not modified.
        pairs: hidden states of the original and of the quantized model for the same tokens, [..., hidden] each.

    Returns: float32 [hidden]; the original weight in channels that are always zero.
    """
    weight = norm.get_parameter("weight")
    zero_norm, unit_norm = copy.deepcopy(norm), copy.deepcopy(norm)
    zero_norm.get_parameter("weight").zero_()
    unit_norm.get_parameter("weight").fill_(1.0)
    products = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    squares = torch.zeros_like(products)
    for original, quantized in pairs:
        offset = zero_norm(quantized)  # what does not depend on the weight: a bias, Gemma's 1
        y_hat = (unit_norm(quantized) - offset).flatten(0, -2).double()
        y = (norm(original) - offset).flatten(0, -2).double()
        products += (y * y_hat).sum(0)
        squares += y_hat.square().sum(0)
    return torch.where(squares > 0, products / squares, weight.double()).float()
