"""Allocate, load and compute a language-model head in binary planes in vLLM: a linear whose rows are the vocabulary."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec, tensor_specs, validate_layer
from bwla_kernels.format.head import HEAD_MODULE
from bwla_kernels.format.layer import ROW_TENSORS, loading_dtype
from bwla_kernels.ops import LinearBackend, select_backend
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from bwla_vllm.checks import ADVICE
from bwla_vllm.dummy import dummy_tensors
from bwla_vllm.errors import one_sentence
from bwla_vllm.linear import note_backend, warn_of_untested_triton
from bwla_vllm.observe import Observer
from bwla_vllm.parameter import is_unset, mark_device, replace_parameters, unset

if TYPE_CHECKING:
    from bwla_kernels.format.schema import BWLAFormat

logger = init_logger("vllm.bwla")


@dataclass(frozen=True)
class LocalPlanesHead:
    """The head as this tensor-parallel rank computes it.

    Attributes:
        spec: sizes of this rank's rows of the padded vocabulary, without the bias, which vLLM owns.
        backend: backend that computes the head.
        dummy: whether to replace the load by placeholder tensors.
    """

    spec: LayerSpec
    backend: LinearBackend
    dummy: bool


class BWLAPlanesHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Quantization method of a head in binary planes.

    Args:
        quantization: the checkpoint's config.
        backend_name: requested backend, or None for the fastest.
        observer: collects the summary of the head.
    """

    def __init__(self, quantization: "BWLAFormat", backend_name: str | None, observer: Observer) -> None:
        self.quantization = quantization
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
        """Register the tensors of this rank's rows of the padded vocabulary, and the whole input transform.

        Raises:
            StartError: sizes that contradict the config; no such backend.
        """
        with one_sentence():
            spec = self.quantization.layer_spec(
                HEAD_MODULE, sum(output_partition_sizes), input_size_per_partition
            )
            assert spec is not None  # checked by get_quant_method
            for name, want in tensor_specs(spec).items():
                parameter = Parameter(unset(want.shape, loading_dtype(want)), requires_grad=False)
                rows = {"output_dim": 0} if name in ROW_TENSORS else {}
                set_weight_attrs(parameter, {**rows, **extra_weight_attrs})
                layer.register_parameter(name, parameter)
            backend, reason = select_backend(spec, layer.weight_packed.device, self.backend_name)
        count = "one binary plane" if spec.planes == 1 else f"{spec.planes} binary planes"
        logger.info_once("BWLA head, %s: %s", count, reason)
        if backend.name == "triton":
            warn_of_untested_triton()
        backend = self.observer.watch_layer(backend, HEAD_MODULE)
        self.observer.expect(HEAD_MODULE)
        layer.bwla = LocalPlanesHead(spec, backend, note_backend(backend.name))
        layer.bwla_tensors = ()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and repack it for the backend.

        Raises:
            StartError: missing or invalid tensors.
        """
        started = time.perf_counter()
        local: LocalPlanesHead = layer.bwla
        stored = {name: layer.get_parameter(name).data for name in tensor_specs(local.spec)}
        if local.dummy:
            tensors = dummy_tensors(local.spec, stored["weight_scale"].device)
        else:
            tensors = stored
            with one_sentence():
                self._check_loaded(layer, stored)
        prepared = local.backend.prepare(tensors, local.spec)
        replace_parameters(layer, stored, prepared)
        mark_device(layer, "weight_packed", torch.int32)
        self.observer.loaded(HEAD_MODULE, local.backend, local.spec, prepared, time.perf_counter() - started)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x [..., K] -> [..., V] in the dtype of x."""
        local: LocalPlanesHead = layer.bwla
        y = local.backend.apply(x, {name: getattr(layer, name) for name in layer.bwla_tensors}, local.spec)
        return y if bias is None else y + bias

    def _check_loaded(self, layer: Any, stored: dict[str, Tensor]) -> None:
        """Check the rows of the vocabulary; vLLM fills those beyond it with zeros, which are not valid scales."""
        local: LocalPlanesHead = layer.bwla
        shard = layer.shard_indices
        rows = shard.org_vocab_end_index - shard.org_vocab_start_index
        own = {name: tensor[:rows] if name in ROW_TENSORS else tensor for name, tensor in stored.items()}
        for name, tensor in own.items():
            if is_unset(tensor):
                raise FormatError(f"{HEAD_MODULE}.{name}: not found in the checkpoint; {ADVICE}")
        spec = self.quantization.layer_spec(HEAD_MODULE, rows, local.spec.in_features)
        assert spec is not None
        validate_layer(HEAD_MODULE, own, spec)
