"""`BWLALinearMethod`: how vLLM allocates, loads and computes one quantized linear."""

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec, tensor_specs, validate_layer
from bwla_kernels.format.layer import INPUT_TRANSFORM
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
from bwla_vllm.compat import untested_triton
from bwla_vllm.dummy import dummy_tensors, loads_dummy_weights
from bwla_vllm.errors import one_sentence
from bwla_vllm.observe import Observer
from bwla_vllm.parameter import (
    CheckedParameter,
    ScaleParameter,
    SharedParameter,
    SignsParameter,
    is_unset,
    unset,
)

if TYPE_CHECKING:
    from bwla_kernels.format.schema import BWLAFormat

logger = init_logger("vllm.bwla")


@dataclass(frozen=True)
class LocalLinear:
    """How one layer is loaded and computed on this rank.

    Attributes:
        spec: sizes of this rank's share, without the bias, which vLLM owns.
        rows: output rows of each fused part on this rank.
        backend: what computes the layer.
        dummy: whether the first load is to be replaced by stand-ins.
    """

    spec: LayerSpec
    rows: tuple[int, ...]
    backend: LinearBackend
    dummy: bool


@register_weight_loader_v2_supported_method
class BWLALinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear, or the linears that vLLM fuses into one (q, k, v; gate, up).

    Args:
        quantization: the checkpoint's config.
        name: the layer's name inside vLLM, for messages.
        parts: checkpoint names of the fused linears; the name itself where nothing is fused.
        stored: sizes of the checkpoint's linears by name, as far as the headers were read.
        wanted: backend asked for, or None.
        observer: what the layer reports to.
    """

    def __init__(
        self,
        quantization: "BWLAFormat",
        name: str,
        parts: tuple[str, ...],
        stored: Mapping[str, LayerSpec],
        wanted: str | None,
        observer: Observer,
    ) -> None:
        self.quantization = quantization
        self.name = name
        self.parts = parts
        self.stored = {part: stored[part] for part in parts if part in stored}
        self.wanted = wanted
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
                        f"{self.name}: fused replicated layers cannot be quantized: use --ignore"
                    )
                loader = load_replicated
            elif len(output_partition_sizes) > 1:
                loader = checks_merged(loader, layer)
            for name, want in tensor_specs(spec).items():
                parameter = _make_parameter(
                    name,
                    want.shape,
                    want.dtypes[0],
                    len(output_partition_sizes),
                    f"{self.name}.{name}",
                    loader,
                )
                layer.register_parameter(name, parameter)
            backend, reason = select_backend(spec, layer.weight_packed.device, self.wanted)
        logger.info_once("BWLA layers: %s", reason)
        if backend.name == "triton":
            _warn_of_untested_triton()
        backend = self.observer.watch_layer(backend, self.name)
        self.observer.expect(self.name)
        layer.bwla = LocalLinear(spec, tuple(output_partition_sizes), backend, _note_backend(backend.name))
        layer.bwla_tensors = ()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, merge the copies of fused parts, repack for the backend, drop the rest.

        Raises:
            StartError: missing, inconsistent or invalid tensors.
        """
        local: LocalLinear = layer.bwla
        stored = {
            name: layer.get_parameter(name) for name in tensor_specs(local.spec) if hasattr(layer, name)
        }
        if not isinstance(stored.get("weight_scale"), CheckedParameter):
            return  # Already repacked; a reload brings the checked parameters back first.
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
        for name in stored:
            delattr(layer, name)
        for name, tensor in prepared.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        layer.bwla_tensors = tuple(prepared)
        self.observer.loaded(self.name, local.backend, local.spec, prepared, time.perf_counter() - started)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of x; vLLM says by `bias` whether it is to be added here."""
        local: LocalLinear = layer.bwla
        tensors = {name: getattr(layer, name) for name in layer.bwla_tensors}
        if bias is not None:
            tensors["bias"] = bias
        return local.backend.apply(x, tensors, local.spec)

    def _local_spec(self, input_size: int, output_size: int, width: int, rows: list[int]) -> LayerSpec:
        """This rank's share of the layer: `rows` a part and `width` columns."""
        spec = self.quantization.layer_spec(self.parts[0], output_size, input_size)
        assert spec is not None  # get_quant_method asked the same question
        ranks = input_size // width
        check_rotation_groups(self.name, spec, ranks)
        return replace(
            spec, out_features=sum(rows), in_features=width, rotation_groups=spec.rotation_groups // ranks
        )

    def _check_bias(self, layer: Any) -> None:
        """vLLM fills a bias that the checkpoint lacks with nothing, and ignores one that the model lacks."""
        wanted = getattr(layer, "bias", None) is not None
        for part, spec in self.stored.items():
            if spec.bias != wanted:
                found = "has one" if spec.bias else "has none"
                raise FormatError(
                    f"{part}.bias: the model {'needs' if wanted else 'has no place for'} a bias, but the "
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
    """Weight loader of layers that every rank holds whole (vLLM's own knows no slots)."""
    param.load_replicated_weight(loaded_weight)


def checks_merged(loader: Any, layer: Any) -> Any:
    """A weight loader that refuses a tensor of all parts at once (Phi-3's qkv_proj) of another length.

    vLLM cuts such a tensor into parts itself, from its beginning, and would drop what is left over.
    """

    def load(param: CheckedParameter, loaded_weight: Tensor, *shard: Any, **named: Any) -> Any:
        whole = all(part is None for part in (*shard, *named.values()))
        if whole and not isinstance(param, SharedParameter):
            param.refuse_other(loaded_weight, (_stored_rows(layer), *param.data.shape[1:]))
        return loader(param, loaded_weight, *shard, **named)

    return load


def _stored_rows(layer: Any) -> int:
    """Rows of all parts of a fused layer together, over all ranks; copies of key and value heads counted once."""
    if isinstance(layer, QKVParallelLinear):
        value_size = getattr(layer, "v_head_size", layer.head_size)  # not in older releases
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        return int((heads + kv_heads) * layer.head_size + kv_heads * value_size)
    return int(sum(layer.output_sizes))


def _make_parameter(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, slots: int, label: str, loader: Any
) -> CheckedParameter:
    if name in INPUT_TRANSFORM:
        shard_dim = 1 if name == "low_rank_a" else 0
        data = unset((slots, *shape), dtype)
        return SharedParameter(shard_dim=shard_dim, data=data, label=label, weight_loader=loader)
    kind: type[CheckedParameter] = SignsParameter if name == "weight_packed" else ScaleParameter
    return kind(data=unset(shape, dtype), label=label, weight_loader=loader)


def _merged(parameter: Parameter) -> Tensor:
    """The parameter's values; of several equal slots only one, in memory of its own."""
    data: Tensor = parameter.data
    if not isinstance(parameter, SharedParameter):
        return data
    return data[0].clone() if len(data) > 1 else data[0]


def _warn_of_untested_triton() -> None:
    """Say once a process where the kernels are about to be compiled by a Triton that they were not checked with."""
    import triton  # as the backend does, only where a layer needs it

    warning = untested_triton(triton.__version__)
    if warning:
        logger.warning_once(warning)


DEPENDENT_SWITCH = "bwla_dependent_launch"
"""Key of vLLM's `--additional-config` that keeps kernels from overlapping: '{"bwla_dependent_launch": false}'."""


def _switch_dependent_launch(additional: Any) -> None:
    """Turn programmatic dependent launch off where the user asks for it, else on."""
    wanted = not isinstance(additional, dict) or additional.get(DEPENDENT_SWITCH, True)
    launch.set_dependent_launch(launch.EARLY if wanted else launch.OFF)
    if not wanted:
        logger.info_once(
            "BWLA layers: kernels wait for one another to end, as asked for by %s", DEPENDENT_SWITCH
        )


def _note_backend(name: str) -> bool:
    """Make the backend part of vLLM's compile-cache key; returns whether vLLM loads dummy weights.

    The key covers the model's config and the plugin's traced files, not the choice of a backend (or a
    changed op): a graph compiled for another one would be loaded. `additional_config` is vLLM's place for
    what a plugin adds to the key.
    """
    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    if isinstance(config.additional_config, dict):
        noted = config.additional_config.get("bwla", {})
        names = sorted({name, *noted.get("backends", [])})
        config.additional_config["bwla"] = {"backends": names, "version": importlib.metadata.version("bwla")}
    if name == "triton":
        from bwla_vllm import fusion  # brings vLLM's compiler: only where it is needed

        fusion.install(config)
        _switch_dependent_launch(config.additional_config)
    return loads_dummy_weights(config)
