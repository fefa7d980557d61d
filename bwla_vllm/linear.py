"""`BWLALinearMethod`: allocate, load and compute a quantized linear in vLLM."""

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec, tensor_specs, validate_layer
from bwla_kernels.format.layer import GROUP_SCALE_DTYPES, INPUT_TRANSFORM, TensorSpec, loading_dtype
from bwla_kernels.ops import LinearBackend, select_backend
from bwla_kernels.triton import launch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    register_weight_loader_v2_supported_method,
)

from bwla_vllm.checks import ADVICE, check_rotation_groups
from bwla_vllm.compat.releases import untested_triton
from bwla_vllm.dummy import dummy_tensors, loads_dummy_weights
from bwla_vllm.errors import one_sentence
from bwla_vllm.observe import Observer
from bwla_vllm.parameter import (
    CheckedParameter,
    GroupScaleParameter,
    ScaleParameter,
    SharedParameter,
    SignsParameter,
    is_unset,
    mark_device,
    replace_parameters,
    unset,
)
from bwla_vllm.vocabulary.head import stop_watching

if TYPE_CHECKING:
    from bwla_kernels.format.schema import BWLAFormat

logger = init_logger("vllm.bwla")

DEPENDENT_SWITCH = "bwla_dependent_launch"
"""Key of vLLM's `--additional-config` that disables overlapping kernels: '{"bwla_dependent_launch": false}'."""


@dataclass(frozen=True)
class LocalLinear:
    """A layer as this tensor-parallel rank loads and computes it.

    Attributes:
        spec: sizes of this rank's shard, without the bias, which vLLM owns.
        rows: output rows of each fused part on this rank.
        backend: backend that computes the layer.
        dummy: whether to replace the first load by placeholder tensors.
    """

    spec: LayerSpec
    rows: tuple[int, ...]
    backend: LinearBackend
    dummy: bool


@register_weight_loader_v2_supported_method
class BWLALinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Quantization method of a linear, or of the linears that vLLM fuses into one (q, k, v; gate, up).

    Args:
        quantization: the checkpoint's config.
        name: the layer's name inside vLLM, for messages.
        parts: checkpoint names of the fused linears; the name itself where nothing is fused.
        stored: sizes of the checkpoint's linears by name, as far as the headers were read.
        backend_name: requested backend, or None for the fastest.
        observer: collects the summary of the layer.
    """

    def __init__(
        self,
        quantization: "BWLAFormat",
        name: str,
        parts: tuple[str, ...],
        stored: Mapping[str, LayerSpec],
        backend_name: str | None,
        observer: Observer,
    ) -> None:
        self.quantization = quantization
        self.name = name
        self.parts = parts
        self.stored = {part: stored[part] for part in parts if part in stored}
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
        """Register the layer's tensors, filled with values that validation refuses, and choose the backend.

        Raises:
            StartError: sizes that contradict the config or the tensor-parallel size; no such backend.
        """
        with one_sentence():
            spec = self._local_spec(input_size, output_size, input_size_per_partition, output_partition_sizes)
            loader = extra_weight_attrs["weight_loader"]
            if isinstance(layer, ReplicatedLinear):
                if len(output_partition_sizes) > 1:
                    raise FormatError(
                        f"{self.name}: fused replicated layers cannot be quantized: convert again with --ignore"
                    )
                loader = load_replicated
            elif len(output_partition_sizes) > 1:
                loader = checks_merged(loader, layer)
            for name, want in tensor_specs(spec).items():
                label = f"{self.name}.{name}"
                parameter = _make_parameter(name, want, len(output_partition_sizes), label, loader)
                layer.register_parameter(name, parameter)
            backend, reason = select_backend(spec, layer.weight_packed.device, self.backend_name)
        logger.info_once("BWLA layers: %s", reason)
        if backend.name == "triton":
            warn_of_untested_triton()
        backend = self.observer.watch_layer(backend, self.name)
        self.observer.expect(self.name)
        layer.bwla = LocalLinear(spec, tuple(output_partition_sizes), backend, note_backend(backend.name))
        layer.bwla_tensors = ()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, merge the copies of fused parts, repack for the backend, drop the rest.

        Raises:
            StartError: missing, inconsistent or invalid tensors.
        """
        local: LocalLinear = layer.bwla
        own = dict(layer.named_parameters(recurse=False))
        stored = {name: own[name] for name in tensor_specs(local.spec) if name in own}
        if not isinstance(stored.get("weight_scale"), CheckedParameter):
            return  # Already repacked; a reload brings the checked parameters back first.
        stop_watching()
        started = time.perf_counter()
        if local.dummy:
            tensors = dummy_tensors(local.spec, stored["weight_scale"].device)
            layer.bwla = replace(local, dummy=False)  # A later reload brings real weights.
        else:
            with one_sentence():
                self._check_bias(layer)
                self._check_loaded(stored, local.rows)
                tensors = {name: _merged(parameter) for name, parameter in stored.items()}
                validate_layer(self.name, tensors, local.spec)
        prepared = local.backend.prepare(tensors, local.spec)
        replace_parameters(layer, stored, prepared)
        mark_device(layer, "weight_packed", torch.int32)
        self.observer.loaded(self.name, local.backend, local.spec, prepared, time.perf_counter() - started)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x [..., K] -> [..., N] in the dtype of x; vLLM passes `bias` if it is to be added here."""
        local: LocalLinear = layer.bwla
        tensors = {name: getattr(layer, name) for name in layer.bwla_tensors}
        if bias is not None:
            tensors["bias"] = bias
        return local.backend.apply(x, tensors, local.spec)

    def _local_spec(self, input_size: int, output_size: int, width: int, rows: list[int]) -> LayerSpec:
        """Return the spec of this tensor-parallel rank's shard: `rows` of each part and `width` columns."""
        spec = self.quantization.layer_spec(self.parts[0], output_size, input_size)
        assert spec is not None  # checked by get_quant_method
        tp_size = input_size // width
        check_rotation_groups(self.name, spec, tp_size)
        return replace(
            spec, out_features=sum(rows), in_features=width, rotation_groups=spec.rotation_groups // tp_size
        )

    def _check_bias(self, layer: Any) -> None:
        """Check that model and checkpoint agree on the bias.

        vLLM leaves a bias that the checkpoint lacks uninitialized, and ignores one that the model lacks.
        """
        needs_bias = getattr(layer, "bias", None) is not None
        for part, spec in self.stored.items():
            if spec.bias != needs_bias:
                found = "has one" if spec.bias else "has none"
                raise FormatError(
                    f"{part}.bias: the model {'needs a' if needs_bias else 'has no'} bias, but the "
                    f"checkpoint {found}; {ADVICE}"
                )

    def _check_loaded(self, stored: Mapping[str, Parameter], rows: tuple[int, ...]) -> None:
        parts = self.parts if len(self.parts) == len(rows) else (self.name,) * len(rows)
        for name, parameter in stored.items():
            pieces = parameter.data if name in INPUT_TRANSFORM else parameter.data.split(rows)
            for part, piece in zip(parts, pieces, strict=True):
                if is_unset(piece):
                    raise FormatError(f"{part}.{name}: not found in the checkpoint; {ADVICE}")
            if isinstance(parameter, SharedParameter) and not parameter.copies_agree():
                raise FormatError(
                    f"{self.name}.{name}: expected identical copies in {', '.join(parts)}, which read the same "
                    "input, found different ones; convert the model again with one rotation for them"
                )


def load_replicated(param: CheckedParameter, loaded_weight: Tensor) -> None:
    """Load a layer that every tensor-parallel rank holds in full (vLLM's own loader does not support slots)."""
    param.load_replicated_weight(loaded_weight)


def checks_merged(loader: Any, layer: Any) -> Any:
    """Wrap a weight loader so that it refuses a fused tensor (Phi-3's qkv_proj) with the wrong number of rows.

    vLLM splits such a tensor into parts from its beginning, and would drop the remaining rows.
    """

    def load(param: CheckedParameter, loaded_weight: Tensor, *shard: Any, **named: Any) -> Any:
        whole = all(part is None for part in (*shard, *named.values()))
        if whole and not isinstance(param, SharedParameter):
            param.refuse_other(loaded_weight, (_stored_rows(layer), *param.data.shape[1:]))
        return loader(param, loaded_weight, *shard, **named)

    return load


def _stored_rows(layer: Any) -> int:
    """Return the total rows of a fused layer over all tensor-parallel ranks, copies of heads counted once."""
    if isinstance(layer, QKVParallelLinear):
        value_size = getattr(layer, "v_head_size", layer.head_size)  # not in older releases
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        return int((heads + kv_heads) * layer.head_size + kv_heads * value_size)
    return int(sum(layer.output_sizes))


def _make_parameter(name: str, want: TensorSpec, slots: int, label: str, loader: Any) -> CheckedParameter:
    shape, dtype = want.shape, loading_dtype(want)
    if name in INPUT_TRANSFORM:
        shard_dim = 1 if name == "low_rank_a" else 0
        data = unset((slots, *shape), dtype)
        return SharedParameter(shard_dim=shard_dim, data=data, label=label, weight_loader=loader)
    if want.dtypes == GROUP_SCALE_DTYPES:
        data = unset(shape, dtype)
        return GroupScaleParameter(dtypes=want.dtypes, data=data, label=label, weight_loader=loader)
    kind: type[CheckedParameter] = SignsParameter if name == "weight_packed" else ScaleParameter
    return kind(data=unset(shape, dtype), label=label, weight_loader=loader)


def _merged(parameter: Parameter) -> Tensor:
    """Return the parameter's values; of several equal slots only the first, copied."""
    data: Tensor = parameter.data
    if not isinstance(parameter, SharedParameter):
        return data
    return data[0].clone() if len(data) > 1 else data[0]


def warn_of_untested_triton() -> None:
    """Warn, once per process, if the kernels are about to be compiled by an untested Triton release."""
    import triton  # only where a layer needs it, as in the backend

    warning = untested_triton(triton.__version__)
    if warning:
        logger.warning_once(warning)


def _switch_dependent_launch(additional: Any) -> None:
    """Enable programmatic dependent launch unless the user disabled it."""
    enabled = not isinstance(additional, dict) or additional.get(DEPENDENT_SWITCH, True)
    launch.set_dependent_launch(launch.EARLY if enabled else launch.OFF)
    if not enabled:
        logger.info_once("BWLA layers: kernels do not overlap, as requested by %s", DEPENDENT_SWITCH)


def note_backend(name: str) -> bool:
    """Make the backend part of vLLM's compile-cache key; return whether vLLM loads dummy weights.

    The key covers the model's config and the plugin's traced files, but not the choice of a backend (or a changed op):
    a graph compiled for another backend would be loaded. `additional_config` is how a plugin adds to the key.
    """
    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    if isinstance(config.additional_config, dict):
        recorded = config.additional_config.get("bwla", {})
        names = sorted({name, *recorded.get("backends", [])})
        config.additional_config["bwla"] = {"backends": names, "version": importlib.metadata.version("bwla")}
    if name == "triton":
        from bwla_vllm import fusion  # imports vLLM's compiler: only where it is needed

        fusion.install(config)
        _switch_dependent_launch(config.additional_config)
    return loads_dummy_weights(config)
