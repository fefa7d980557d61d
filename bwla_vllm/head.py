"""`BWLAHeadMethod`: allocate, load and compute the 8-bit language-model head in vLLM."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format.head import HEAD_MODULE, HeadSpec, head_tensor_specs, validate_head
from bwla_kernels.ops import HeadBackend, select_head_backend
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from bwla_vllm.checks import ADVICE
from bwla_vllm.dummy import loads_dummy_weights
from bwla_vllm.errors import one_sentence
from bwla_vllm.observe import Observer

logger = init_logger("vllm.bwla")

UNSET_CODE = -128
"""Value of the int8 weights before loading; the codes of the format are -127 or larger."""


@dataclass(frozen=True)
class LocalHead:
    """The head as this tensor-parallel rank computes it.

    Attributes:
        spec: sizes of this rank's shard, with the padded vocabulary.
        backend: backend that computes the head.
        dummy: whether to replace the load by placeholder tensors.
    """

    spec: HeadSpec
    backend: HeadBackend
    dummy: bool


class BWLAHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Quantization method of the head of a checkpoint with `lm_head` in its config.

    Args:
        backend_name: requested backend, or None for the fastest.
        observer: collects the summary of the head.
    """

    def __init__(self, backend_name: str | None, observer: Observer) -> None:
        self.backend_name = backend_name
        self.observer = observer

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register codes and scales for this tensor-parallel rank's rows of the padded vocabulary."""
        spec = HeadSpec(sum(output_partition_sizes), input_size_per_partition)
        for name, want in head_tensor_specs(spec).items():
            fill = float("nan") if want.dtypes[0].is_floating_point else UNSET_CODE
            data = torch.full(want.shape, fill, dtype=want.dtypes[0])
            parameter = Parameter(data, requires_grad=False)
            set_weight_attrs(parameter, {"output_dim": 0, **extra_weight_attrs})
            layer.register_parameter(name, parameter)
        with one_sentence():
            backend, reason = select_head_backend(spec, layer.weight_int8.device, self.backend_name)
        logger.info_once("BWLA head, 8 bits: %s", reason)
        backend = self.observer.watch_head(backend, HEAD_MODULE)
        self.observer.expect(HEAD_MODULE)
        layer.bwla = LocalHead(spec, backend, loads_dummy_weights(get_current_vllm_config_or_none()))
        layer.bwla_tensors = ()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and repack it for the backend.

        Raises:
            StartError: missing or invalid tensors.
        """
        started = time.perf_counter()
        local: LocalHead = layer.bwla
        stored = {name: layer.get_parameter(name).data for name in head_tensor_specs(local.spec)}
        if local.dummy:
            stored = {
                "weight_int8": stored["weight_int8"].random_(-127, 128),
                "weight_scale": stored["weight_scale"],
            }
            stored["weight_scale"].fill_(1e-3)
        # vLLM pads the vocabulary with zeros, which are not valid scales.
        shard = layer.shard_indices
        rows = shard.org_vocab_end_index - shard.org_vocab_start_index
        with one_sentence():
            if bool((stored["weight_int8"][:rows] == UNSET_CODE).any()):
                raise FormatError(f"{HEAD_MODULE}.weight_int8: not found in the checkpoint; {ADVICE}")
            validate_head(
                {name: tensor[:rows] for name, tensor in stored.items()},
                HeadSpec(rows, local.spec.in_features),
            )
        prepared = local.backend.prepare(stored, local.spec)
        for name in stored:
            delattr(layer, name)
        for name, tensor in prepared.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        layer.bwla_tensors = tuple(prepared)
        self.observer.loaded(HEAD_MODULE, local.backend, local.spec, prepared, time.perf_counter() - started)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x [..., K] -> [..., V] in the dtype of x."""
        local: LocalHead = layer.bwla
        y = local.backend.apply(x, {name: getattr(layer, name) for name in layer.bwla_tensors}, local.spec)
        return y if bias is None else y + bias
