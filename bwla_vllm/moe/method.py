"""`BWLAExpertsMethod`: allocate, load and compute the one-bit experts of a mixture-of-experts layer in vLLM."""

import time
from dataclasses import replace
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.spec import stacked_specs
from bwla_kernels.format.layer import INPUT_TRANSFORM, value_problem
from bwla_kernels.ops import select_experts_backend
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from bwla_vllm.checks import ADVICE, check_rotation_groups
from bwla_vllm.dummy import dummy_experts
from bwla_vllm.errors import one_sentence
from bwla_vllm.linear import note_backend, warn_of_untested_triton
from bwla_vllm.moe.loader import LocalExperts, make_parameter
from bwla_vllm.moe.select import activation_of, unused_limits
from bwla_vllm.observe import Observer
from bwla_vllm.parameter import is_unset, mark_device, replace_parameters
from bwla_vllm.vocabulary.head import stop_watching

logger = init_logger("vllm.bwla")


class BWLAExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Quantization method of the experts of one layer.

    The input transform of gate and up is one for all experts, and so is that of down. A checkpoint stores it with
    expert 0, whose gate and up have identical copies.

    Args:
        moe: vLLM's config of the layer.
        spec: sizes of all experts of the layer, not sharded.
        name: the layer's name inside vLLM, for messages.
        backend_name: requested backend, or None for the fastest.
        observer: collects the summary of the layer.
    """

    def __init__(
        self, moe: Any, spec: ExpertsSpec, name: str, backend_name: str | None, observer: Observer
    ) -> None:
        super().__init__(moe)
        self.spec = spec
        self.name = name.removesuffix(".routed_experts")
        self.backend_name = backend_name
        self.observer = observer

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the tensors of this rank's experts, filled with values that validation refuses.

        Raises:
            StartError: sizes that contradict the model or the tensor-parallel size, or options of the layer that no
                kernel computes; no such backend.
        """
        with one_sentence():
            self._check_options(layer)
            spec = self._local_spec(num_experts, hidden_size, intermediate_size_per_partition)
            backend, reason = select_experts_backend(spec, torch.get_default_device(), self.backend_name)
        logger.info_once("BWLA experts: %s", reason)
        if backend.name == "triton":
            warn_of_untested_triton()
        backend = self.observer.watch_experts(backend, self.name)
        self.observer.expect(self.name)
        parallel = self.moe.moe_parallel_config
        dummy = note_backend(backend.name)
        layer.bwla = LocalExperts(spec, parallel.tp_rank, parallel.tp_size, backend, dummy)
        for prefix in ("w13", "w2"):
            for name, want in stacked_specs(num_experts, layer.bwla.projection(prefix)).items():
                layer.register_parameter(
                    f"{prefix}_{name}", make_parameter(layer, self.name, prefix, name, want)
                )
        layer.bwla_tensors = ()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, repack for the backend, drop the rest.

        Raises:
            StartError: missing or invalid tensors.
        """
        local: LocalExperts = layer.bwla
        if not hasattr(layer, "w13_weight_packed"):
            return  # Already repacked; a reload brings the stacked parameters back first.
        stop_watching()
        started = time.perf_counter()
        if local.dummy:
            device = layer.w2_weight_scale.device
            gate_up, down = (
                dummy_experts(local.spec.experts, spec, device)
                for spec in (local.spec.gate_up, local.spec.down)
            )
            layer.bwla = replace(local, dummy=False)  # A later reload brings real weights.
        else:
            with one_sentence():
                gate_up, down = (self._loaded(layer, prefix, local) for prefix in ("w13", "w2"))
        with one_sentence():
            prepared = local.backend.prepare(gate_up, down, local.spec)
        stored = [f"{prefix}_{name}" for prefix, part in (("w13", gate_up), ("w2", down)) for name in part]
        replace_parameters(layer, stored, prepared)
        mark_device(layer, "weight_packed", torch.int32)
        self.observer.loaded(self.name, local.backend, local.spec, prepared, time.perf_counter() - started)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return None: vLLM's own kernels compute nothing here."""
        return

    def apply(
        self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *shared: Any, **named: Any
    ) -> Tensor:
        """Compute x [M, H] -> [M, H] in the dtype of x; vLLM adds shared experts and the other ranks' results."""
        local: LocalExperts = layer.bwla
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]  # -1 for the experts of other ranks
        tensors = {name: getattr(layer, name) for name in layer.bwla_tensors}
        return local.backend.apply(x, topk_weights, topk_ids, tensors, local.spec)

    def _check_options(self, layer: Any) -> None:
        """Refuse what the definition of the experts does not contain.

        Raises:
            FormatError: biases where the checkpoint has none, or none where it has; limits of an activation that has
                none; router weights that multiply the input; another activation than that of the checkpoint.
        """
        advice = "convert the model again with --ignore experts"
        spec, activation = self.spec, activation_of(self.moe)
        if activation != (spec.activation, spec.limit, spec.alpha):
            raise FormatError(
                f"{self.name}: expected activation {spec.activation}, found {activation[0]}; {advice}"
            )
        has_bias = bool(getattr(self.moe, "has_bias", False))
        for part, side in (("gate and up", spec.gate_up), ("down", spec.down)):
            if side.bias != has_bias:
                raise FormatError(
                    f"{self.name}: the model {'needs biases' if has_bias else 'has no bias'} of {part}, but the "
                    f"checkpoint has {'one' if side.bias else 'none'}; {ADVICE}"
                )
        found = unused_limits(self.moe)
        if getattr(layer, "apply_router_weight_on_input", False):
            found.append("apply_router_weight_on_input")
        if found:
            raise FormatError(f"{self.name}: one-bit experts do not support {', '.join(found)}; {advice}")

    def _local_spec(self, experts: int, hidden: int, inner: int) -> ExpertsSpec:
        """Return the sizes of this rank's shard: `experts` of them, with `inner` intermediate values each."""
        full, size = self.spec, self.moe.moe_parallel_config.tp_size
        if hidden != full.hidden_size or inner * size != full.intermediate_size:
            raise FormatError(
                f"{self.name}: expected experts of {full.hidden_size} and {full.intermediate_size} values, found "
                f"{hidden} and {inner * size} in the model; {ADVICE}"
            )
        check_rotation_groups(f"{self.name}.w2", full.down, size)
        return replace(
            full,
            experts=experts,
            gate_up=replace(full.gate_up, out_features=2 * inner),
            down=replace(full.down, in_features=inner, rotation_groups=full.down.rotation_groups // size),
        )

    def _loaded(self, layer: Any, prefix: str, local: LocalExperts) -> dict[str, Tensor]:
        """Return the stacked tensors of one projection, after checking that every expert has its own, and the values.

        Raises:
            FormatError: a tensor is missing or invalid; names the expert by its number in the checkpoint.
        """
        tensors: dict[str, Tensor] = {}
        parts = ("w1", "w3") if prefix == "w13" else ("w2",)
        for name in stacked_specs(local.spec.experts, local.projection(prefix)):
            data = layer.get_parameter(f"{prefix}_{name}").data
            shared = name in INPUT_TRANSFORM
            for slot, one in enumerate(data):
                expert = 0 if shared else _global_number(layer, slot)
                found = {parts[slot]: one} if shared else dict(zip(parts, one.chunk(len(parts)), strict=True))
                for part, piece in found.items():
                    if is_unset(piece):
                        raise FormatError(
                            f"{self.name}.{expert}.{part}.{name}: not found in the checkpoint; {ADVICE}"
                        )
            if shared and not torch.equal(data[0], data[-1]):
                raise FormatError(
                    f"{self.name}.0.w3.{name}: expected the values of w1, which reads the same input, found different "
                    "ones; convert the model again with one rotation for all experts"
                )
            tensors[name] = data[0].clone() if shared and len(data) > 1 else data[0] if shared else data
            problem = value_problem(name, tensors[name])
            if problem:
                raise FormatError(f"{self.name}.{prefix}.{name}: {problem}; {ADVICE}")
        return tensors


def _global_number(layer: Any, local: int) -> int:
    """Return the number in the checkpoint of this rank's expert `local`."""
    expert_map = layer.expert_map
    return local if expert_map is None else int((expert_map == local).nonzero()[0])
