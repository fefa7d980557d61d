"""The last norm in closed form: each channel of what the head reads, scaled to what it should be in the mean square.

What quantization added to the hidden states is noise to the head, which then sounds surer than it has reason to be.
The best scale of a noisy channel y_hat for the original's y is E[y y_hat] / E[y_hat^2] (Wiener's filter, a number a
channel), below one where there is noise. The norm's weight is stored unquantized anyway, so this costs no bits.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def fit_norm(norm: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The weight with which `norm` brings the quantized model's hidden states closest to the original's.

    Any norm that is linear in its weight: RMSNorm, Gemma's (1 + weight), LayerNorm with its bias.

    Args:
        norm: the original's, with its weight; not changed.
        pairs: the original's hidden states and the quantized model's at the same places, [..., hidden] each.

    Returns: float32 [hidden]; the original's weight in channels that are always zero.
    """
    weight = norm.get_parameter("weight")
    unscaled, plain = copy.deepcopy(norm), copy.deepcopy(norm)
    unscaled.get_parameter("weight").zero_()
    plain.get_parameter("weight").fill_(1.0)
    together = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    power = torch.zeros_like(together)
    for original, quantized in pairs:
        rest = unscaled(quantized)
        seen = (plain(quantized) - rest).flatten(0, -2).double()
        wanted = (norm(original) - rest).flatten(0, -2).double()
        together += (wanted * seen).sum(0)
        power += seen.square().sum(0)
    return torch.where(power > 0, together / power, weight.double()).float()
