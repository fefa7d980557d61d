"""Keep LoRA adapters away from requests without one, on CPUs and in releases of vLLM before 0.33.

vLLM marks a row without an adapter with -1. Its LoRA operations for CPUs take that for the last adapter in memory: a
request to the base model is answered with this adapter if it shares a batch with a request to any. vLLM 0.33 is the
first release with the fix (vllm-project/vllm#48421), and earlier ones have no hook for these operations, so they are
replaced. An adapter adds nothing to a row whose input is zero.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.platforms import current_platform

from bwla_vllm.compat.releases import CPU_LORA_OPERATIONS, SKIPPING_CPU_LORA, is_at_least


def skip_rows_without_adapter(config: Any, release: str) -> bool:
    """Make vLLM's LoRA operations for CPUs skip the rows without an adapter; return whether that was necessary.

    Args:
        config: vLLM's config while it builds the model.
        release: vLLM's release.
    """
    fixed = is_at_least(release, SKIPPING_CPU_LORA)
    if fixed or config.lora_config is None or not current_platform.is_cpu():
        return False
    for name in CPU_LORA_OPERATIONS:
        operation = getattr(lora_ops, name)
        if not hasattr(operation, "__wrapped__"):
            for module in (lora_ops, punica_cpu):  # each has its own reference
                setattr(module, name, skipping(operation))
    return True


def skipping(operation: Callable[..., None]) -> Callable[..., None]:
    """Return a LoRA operation that takes zeros for the inputs of rows whose adapter is -1."""

    @functools.wraps(operation)
    def apply(
        inputs: Tensor, weights: Tensor, output: Tensor, adapters: Tensor, *options: Any, **named: Any
    ) -> None:
        rows = torch.where((adapters < 0).unsqueeze(1), 0, inputs)
        operation(rows, weights, output, adapters, *options, **named)

    return apply
