"""Allocate, load and compute the 8-bit language-model head and the 8-bit embedding in vLLM."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format.head import EMBEDDING_MODULE, HEAD_MODULE, HeadSpec, head_tensor_specs, validate_head
from bwla_kernels.head import TorchHead, dequantize_rows
from bwla_kernels.ops import HeadBackend, select_head_backend
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import set_weight_attrs

from bwla_vllm.checks import ADVICE
from bwla_vllm.dummy import loads_dummy_weights
from bwla_vllm.errors import StartError, one_sentence
from bwla_vllm.loading import derives_classifier, has_own_head
from bwla_vllm.observe import Observer
from bwla_vllm.parameter import mark_device, replace_parameters

if TYPE_CHECKING:
    from bwla_kernels.format.schema import BWLAFormat

logger = init_logger("vllm.bwla")

CHUNK_ELEMENTS = 2**24
"""Number of weights that are dequantized at a time."""

UNSET_CODE = -128
"""Value of the int8 weights before loading; the codes of the format are -127 or larger."""


@dataclass(frozen=True)
class LocalHead:
    """The head or the embedding as this tensor-parallel rank computes it.

    Attributes:
        spec: sizes of this rank's shard, with the padded vocabulary.
        backend: backend that computes the head.
        dtype: dtype of the model's activations, to which an embedding's rows are rounded.
        dummy: whether to replace the load by placeholder tensors.
    """

    spec: HeadSpec
    backend: HeadBackend
    dtype: torch.dtype
    dummy: bool


class BWLAHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Quantization method of the head of a checkpoint with `lm_head` in its config.

    Args:
        backend_name: requested backend, or None for the fastest.
        observer: collects the summary of the head.

    Attributes:
        module: name of the layer in the checkpoint.
        is_head: whether the layer computes logits.
    """

    module = HEAD_MODULE
    is_head = True

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
        if self.is_head:
            logger.info_once("BWLA head, 8 bits: %s", reason)
            backend = self.observer.watch_head(backend, self.module)
        self.observer.expect(self.module)
        dummy = loads_dummy_weights(get_current_vllm_config_or_none())
        layer.bwla = LocalHead(spec, backend, params_dtype, dummy)
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
                raise FormatError(f"{self.module}.weight_int8: not found in the checkpoint; {ADVICE}")
            validate_head(
                {name: tensor[:rows] for name, tensor in stored.items()},
                HeadSpec(rows, local.spec.in_features),
                self.module,
            )
        prepared = local.backend.prepare(stored, local.spec)
        replace_parameters(layer, stored, prepared)
        mark_device(layer, "weight", local.dtype)
        self.observer.loaded(self.module, local.backend, local.spec, prepared, time.perf_counter() - started)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x [..., K] -> [..., V] in the dtype of x."""
        local: LocalHead = layer.bwla
        y = local.backend.apply(x, {name: getattr(layer, name) for name in layer.bwla_tensors}, local.spec)
        return y if bias is None else y + bias


class BWLAEmbeddingMethod(BWLAHeadMethod):
    """Quantization method of an 8-bit embedding, and of a head that is tied to it.

    Rows are looked up in plain torch, which torch.compile and CUDA graphs can trace; the tied head is computed as one
    that is stored. Where vLLM derives a classifier from rows of the tied head, it finds them in `weight`, which exists
    only while weights are loaded.

    Args:
        backend_name, observer: as in `BWLAHeadMethod`.
        is_head: whether the model's head is tied to the embedding.
    """

    module = EMBEDDING_MODULE

    def __init__(self, backend_name: str | None, observer: Observer, is_head: bool) -> None:
        super().__init__(backend_name if is_head else TorchHead.name, observer)
        self.is_head = is_head

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
        """Register codes and scales, and the dequantized weight where vLLM derives a classifier from it."""
        config = get_current_vllm_config_or_none()
        model = None if config is None else config.model_config
        derives = self.is_head and model is not None and derives_classifier(model.hf_config)
        if derives:
            shape = sum(output_partition_sizes), input_size_per_partition
            weight = torch.full(shape, float("nan"), dtype=params_dtype)
            layer.register_parameter("weight", Parameter(weight, requires_grad=False))
            extra_weight_attrs["weight_loader"] = fills_weight(extra_weight_attrs["weight_loader"], layer)
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Drop the dequantized weight, then check and repack what was loaded.

        Raises:
            StartError: missing or invalid tensors.
        """
        if isinstance(getattr(layer, "weight", None), Parameter):
            del layer.weight
        super().process_weights_after_loading(layer)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Look up this rank's rows: ids [...] -> [..., K] in the model's dtype."""
        return dequantize_rows(layer.weight_int8, layer.weight_scale, input_, layer.bwla.dtype)


def fills_weight(loader: Any, layer: Any) -> Any:
    """Wrap the weight loader of an embedding so that it dequantizes `layer.weight` once codes and scales are loaded."""

    def load(param: Parameter, loaded_weight: Tensor) -> None:
        loader(param, loaded_weight)
        shard = layer.shard_indices
        rows = shard.org_vocab_end_index - shard.org_vocab_start_index
        codes, scale = layer.weight_int8.data[:rows], layer.weight_scale.data[:rows]
        if scale.isnan().any() or (codes == UNSET_CODE).any():
            return
        step = max(1, CHUNK_ELEMENTS // codes.shape[1])
        for ids in torch.arange(rows, device=codes.device).split(step):
            layer.weight.data[ids] = dequantize_rows(codes, scale, ids, layer.weight.dtype)

    return load


class BWLATiedHeadMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Method of a head that vLLM will replace by the 8-bit embedding: it has no tensors of its own."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Allocate nothing."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Return the layer to compute logits with: the embedding."""
        return embed_tokens

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuse a model class that kept this head.

        Raises:
            StartError: always.
        """
        raise _not_tied()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Refuse to compute, as in `process_weights_after_loading`."""
        raise _not_tied()


class VocabularyWatch:
    """Refuses a model class that builds its 8-bit head or embedding without the quantization config.

    vLLM's loader would only say that there is no parameter called `lm_head.weight_int8`. The first public place where
    such a layer shows is the model's attribute, for which torch has a hook; it is removed once weights are loaded, and
    does nothing to other models of the process.

    Args:
        owner: the quantization config of the engine whose model is built; None outside an engine.
        quantization: the checkpoint's config.
        ties_head: whether the model ties its head to its embedding.
        drops_head: whether vLLM removes the head after it built the model, as pooling models do.
    """

    active: "ClassVar[VocabularyWatch | None]" = None

    def __init__(
        self, owner: Any, quantization: "BWLAFormat", ties_head: bool, drops_head: bool = False
    ) -> None:
        self.owner = owner
        self.embedding = quantization.embedding is not None
        own_head = has_own_head(quantization)
        self.head = (own_head or (self.embedding and ties_head)) and not drops_head
        self.head_option = "--lm-head-bits" if own_head else "--embedding-bits"
        self._hook = register_module_module_registration_hook(self.check)

    def check(self, parent: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        """Check a module that becomes `parent.name`, and the parent's embedding, which may be older than the hook.

        Raises:
            StartError: a head or an embedding without the method for its stored tensors.
        """
        engine = get_current_vllm_config_or_none()
        if (engine and engine.quant_config) is not self.owner:
            return  # another model, after this one could not be loaded
        if self.head and isinstance(module, ParallelLMHead):
            _refuse_unquantized(parent, name, module, self.head_option)
        leaf = EMBEDDING_MODULE.rpartition(".")[2]
        embedding = module if name == leaf else getattr(parent, leaf, None)
        if self.embedding and isinstance(embedding, VocabParallelEmbedding):
            _refuse_unquantized(parent, leaf, embedding, "--embedding-bits")

    def stop(self) -> None:
        """Stop checking."""
        self._hook.remove()


def _refuse_unquantized(parent: torch.nn.Module, name: str, layer: Any, option: str) -> None:
    if isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
        raise StartError(
            f"{name}: expected 16 bits, because vLLM's class {type(parent).__name__} builds this layer without the "
            f"quantization config, found a quantized layer: convert the model again with {option} 16"
        )


def watch_vocabulary(quantization: "BWLAFormat", ties_head: bool) -> None:
    """Watch the model that vLLM is building; outside an engine, do nothing."""
    stop_watching()
    config = get_current_vllm_config_or_none()
    if config is not None and config.model_config is not None:
        drops_head = config.model_config.runner_type == "pooling"
        VocabularyWatch.active = VocabularyWatch(config.quant_config, quantization, ties_head, drops_head)


def stop_watching() -> None:
    """End the watch, if there is one: the model is complete."""
    if VocabularyWatch.active is not None:
        VocabularyWatch.active.stop()
        VocabularyWatch.active = None


def _not_tied() -> StartError:
    return StartError(
        f"{HEAD_MODULE}: config.json ties the head to the 8-bit embedding, but vLLM's class for this model does "
        "not: convert the model again with --embedding-bits 16"
    )
