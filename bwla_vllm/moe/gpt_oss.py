"""vLLM's class of gpt-oss, which loads one-bit experts too.

The class loads experts itself, by names that BWLA's tensors do not have, and leaves out tensors of other names. vLLM
lets a plugin register a class of its own for an architecture; this one differs from vLLM's only where a layer has
one-bit experts.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from bwla_kernels.format.experts import experts_module
from torch import Tensor
from vllm.model_executor.models import gpt_oss

from bwla_vllm.moe.loader import LocalExperts


class GptOssForCausalLM(gpt_oss.GptOssForCausalLM):  # type: ignore[misc]
    """gpt-oss whose layers of one-bit experts load their own tensors, as those of most other classes do."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load all weights; return the names of the parameters that were loaded.

        Args:
            weights: names in the checkpoint, and tensors.
        """
        layers = {
            name.removesuffix(".routed_experts"): (name, module)
            for name, module in self.named_modules()
            if isinstance(getattr(module, "bwla", None), LocalExperts)
        }
        loaded: set[str] = set()
        loaded.update(super().load_weights(_load_experts(layers, weights, loaded) if layers else weights))
        return loaded


def _load_experts(
    layers: dict[str, tuple[str, Any]], weights: Iterable[tuple[str, Tensor]], loaded: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """Hand the tensors of one-bit experts to their layer, and yield all others.

    Args:
        layers: path of the experts in the checkpoint -> name and module of vLLM's layer.
        weights: names in the checkpoint, and tensors.
        loaded: where names of loaded parameters are added.
    """
    for path, tensors in groupby(weights, key=lambda item: experts_module(item[0].rpartition(".")[0])):
        if path not in layers:
            yield from tensors
            continue
        name, layer = layers[path]
        own = ((stored.removeprefix(f"{path}."), tensor) for stored, tensor in tensors)
        loaded.update(f"{name}.{parameter}" for parameter in layer.load_weights(own))
