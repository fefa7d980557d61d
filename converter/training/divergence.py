"""KL divergence between the next-token distributions of two models, from their last hidden states.

The logits of a batch, [tokens, vocabulary], are far larger than everything else in training. They are computed for a
few tokens at a time, together with the gradient of the loss with respect to the hidden states, and never kept (as the
fused losses of Liger Kernel, arXiv 2410.10989, do).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**23
"""Logits computed at a time on a CPU: they stay in memory that is allocated already."""

ACCELERATOR_CHUNK_LOGITS = 2**27
"""The same for all other devices."""


def chunk_logits(device: str) -> int:
    """Return how many logits are computed at a time on a device type."""
    return CHUNK_LOGITS if device == "cpu" else ACCELERATOR_CHUNK_LOGITS


Head = Callable[[Tensor], Tensor]
"""The part of a language model after its base model: hidden states [M, K] -> logits [M, V], float32."""


def _logits_with_input(head: Head, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the head's input [M, K], a leaf of autograd, and its logits [M, V]."""
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_(True)
        return leaf, head(leaf)


class _Divergence(torch.autograd.Function):
    """Arguments as in `kl_divergence`; only `hidden` gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        original_hidden: Tensor,
        original_head: Head,
        vocabulary: int,
    ) -> Tensor:
        tokens = max(1, chunk_logits(hidden.device.type) // vocabulary)
        rows, original_rows = hidden.flatten(0, -2), original_hidden.flatten(0, -2)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for first in range(0, len(rows), tokens):
            part = slice(first, first + tokens)
            original = original_head(original_rows[part]).log_softmax(-1)
            leaf, logits = _logits_with_input(head, rows[part])
            log_probabilities = logits.detach().log_softmax(-1)
            probabilities = original.exp()
            total += original.sub_(log_probabilities).mul_(probabilities).sum(-1).double().sum()
            if gradient is not None:
                of_logits = log_probabilities.exp_().sub_(probabilities)
                gradient[part] = torch.autograd.grad(logits, leaf, of_logits)[0] / len(rows)
        ctx.gradient = None if gradient is None else gradient.view_as(hidden)
        return (total / len(rows)).float()

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        return of_loss * ctx.gradient, None, None, None, None


def kl_divergence(
    hidden: Tensor, head: Head, original_hidden: Tensor, original_head: Head, vocabulary: int
) -> Tensor:
    """Return the mean over tokens of KL(original || model) in nats, a differentiable scalar.

    Args:
        hidden: the model's hidden states after its final norm [..., K]; the only argument that gets a gradient.
        head: its head.
        original_hidden: the original's hidden states after its final norm [..., K'].
        original_head: the original's head, with the same vocabulary.
        vocabulary: number of logits.
    """
    function: Any = _Divergence.apply  # untyped in torch
    result: Tensor = function(hidden, head, original_hidden, original_head, vocabulary)
    return result


def sampled_direction_gradient(hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient, for a random direction v of each token, of v^T h / |h|.

    As v has the covariance I, the mean over v of the square of a change in this direction is the squared change of the
    normalized hidden state, which is twice the cosine distance for small changes.

    Args:
        hidden: hidden states after the final norm [..., K].
        generator: source of the directions, on the CPU.

    Returns: the gradient of the sum over all tokens with respect to `hidden`, [..., K].
    """
    length = hidden.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(hidden.dtype).tiny)
    unit = hidden / length
    direction = torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)
    gradient: Tensor = (direction - unit * (unit * direction).sum(-1, keepdim=True)) / length
    return gradient


def sampled_label_gradient(hidden: Tensor, head: Head, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Return the gradient of the log-likelihood of labels that are drawn from the model's own distribution.

    Args:
        hidden: hidden states after the final norm [..., K].
        head: the model's head.
        vocabulary: number of logits.
        generator: source of the labels, on the CPU.

    Returns: the gradient of the sum over all tokens with respect to `hidden`, [..., K].
    """
    rows = hidden.flatten(0, -2)
    gradient = torch.empty_like(rows)
    tokens = max(1, chunk_logits(hidden.device.type) // vocabulary)
    for first in range(0, len(rows), tokens):
        part = slice(first, first + tokens)
        leaf, logits = _logits_with_input(head, rows[part])
        probabilities = logits.detach().softmax(-1)
        # By inversion of the distribution function, with one random number per token from the CPU.
        level = torch.rand(len(probabilities), 1, generator=generator).to(hidden.device)
        labels = torch.searchsorted(probabilities.cumsum(-1), level).clamp_max(vocabulary - 1)
        of_logits = probabilities.neg_().scatter_add_(1, labels, torch.ones_like(level))
        gradient[part] = torch.autograd.grad(logits, leaf, of_logits)[0]
    return gradient.view_as(hidden)
