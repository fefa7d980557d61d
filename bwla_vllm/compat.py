"""What differs between the vLLM releases that the plugin supports (0.26 to 0.33)."""

import vllm.model_executor.layers.fused_moe as fused_moe
from torch import nn


def is_moe_layer(layer: nn.Module) -> bool:
    """Whether `layer` holds a mixture's experts: `FusedMoE` in older releases, `RoutedExperts` in newer ones.

    The old name lives on in newer releases as a factory function, which is no class to compare with.
    """
    named = (getattr(fused_moe, name, None) for name in ("RoutedExperts", "FusedMoE"))
    return isinstance(layer, tuple(kind for kind in named if isinstance(kind, type)))
