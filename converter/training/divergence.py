"""KL divergence between the next-token distributions of two models, from their last hidden states.

The logits of a batch, [tokens, vocabulary], are far larger than everything else in training. They are computed for a
few tokens at a time, together with the gradient of the loss with respect to the hidden states, and never kept (as the
fused losses of Liger Kernel, arXiv 2410.10989, do).
"""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Head:
    """A language-model head.

    Attributes:
        weight: [V, K].
        soft_cap: c of logits c tanh(z / c), as in Gemma 2; None for logits z.
    """

    weight: Tensor
    soft_cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [M, K], float32 [M, V]."""
        logits = (hidden @ self.weight.mT).float()
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def gradient(self, of_logits: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient with respect to the hidden states [M, K], given that of the logits [M, V]."""
        if self.soft_cap is not None:
            of_logits = of_logits * (1.0 - (logits / self.soft_cap).square())
        return of_logits.to(self.weight.dtype) @ self.weight


class _Divergence(torch.autograd.Function):
    """Arguments as in `kl_divergence`; only `hidden` gets a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, original_hidden: Tensor, original_head: Head) -> Tensor:
        tokens = max(1, chunk_logits(hidden.device.type) // len(head.weight))
        rows, original_rows = hidden.flatten(0, -2), original_hidden.flatten(0, -2)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for first in range(0, len(rows), tokens):
            part = slice(first, first + tokens)
            original = original_head.logits(original_rows[part]).log_softmax(-1)
            logits = head.logits(rows[part])
            log_probabilities = logits.log_softmax(-1)
            probabilities = original.exp()
            total += original.sub_(log_probabilities).mul_(probabilities).sum(-1).double().sum()
            if gradient is not None:
                of_logits = log_probabilities.exp_().sub_(probabilities)
                gradient[part] = head.gradient(of_logits, logits) / len(rows)
        ctx.gradient = None if gradient is None else gradient.view_as(hidden)
        return (total / len(rows)).float()

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor, None, None, None]:
        return of_loss * ctx.gradient, None, None, None


def kl_divergence(hidden: Tensor, head: Head, original_hidden: Tensor, original_head: Head) -> Tensor:
    """Return the mean over tokens of KL(original || model) in nats, a differentiable scalar.

    Args:
        hidden: the model's hidden states after its final norm [..., K]; the only argument that gets a gradient.
        head: its head.
        original_hidden: the original's hidden states after its final norm [..., K'].
        original_head: the original's head, with the same vocabulary.
    """
    function: Any = _Divergence.apply  # untyped in torch
    result: Tensor = function(hidden, head, original_hidden, original_head)
    return result


def sampled_label_gradient(hidden: Tensor, head: Head, generator: torch.Generator) -> Tensor:
    """Return the gradient of the log-likelihood of labels that are drawn from the model's own distribution.

    Args:
        hidden: hidden states after the final norm [..., K].
        head: the model's head.
        generator: source of the labels, on the CPU.

    Returns: the gradient of the sum over all tokens with respect to `hidden`, [..., K].
    """
    rows = hidden.flatten(0, -2)
    gradient = torch.empty_like(rows)
    tokens = max(1, chunk_logits(hidden.device.type) // len(head.weight))
    for first in range(0, len(rows), tokens):
        part = slice(first, first + tokens)
        logits = head.logits(rows[part])
        probabilities = logits.softmax(-1)
        # By inversion of the distribution function, with one random number per token from the CPU.
        level = torch.rand(len(probabilities), 1, generator=generator).to(hidden.device)
        labels = torch.searchsorted(probabilities.cumsum(-1), level).clamp_max(len(head.weight) - 1)
        of_logits = probabilities.neg_().scatter_add_(1, labels, torch.ones_like(level))
        gradient[part] = head.gradient(of_logits, logits)
    return gradient.view_as(hidden)
