"""`BWLAExpertsMethod`: allocate, load and compute the one-bit experts of a mixture-of-experts layer in vLLM."""

from dataclasses import replace
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.spec import stacked_specs
from bwla_kernels.format.layer import INPUT_TRANSFORM, value_problem
from bwla_kernels.ops import select_experts_backend
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from bwla_vllm.checks import ADVICE, check_rotation_groups
from bwla_vllm.errors import one_sentence
from bwla_vllm.head import stop_watching
from bwla_vllm.moe.loader import ExpertLoader, LocalExperts
from bwla_vllm.parameter import is_unset, mark_device, unset

logger = init_logger("vllm.bwla")


class BWLAExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Quantization method of the experts of one layer.

    The input transform of gate and up is one for all experts, and so is that of down. A checkpoint may store it with
    every expert or with some: copies must be identical.

    Args:
        moe: vLLM's config of the layer.
        spec: sizes of all experts of the layer, not sharded.
        name: the layer's name inside vLLM, for messages.
        backend_name: requested backend, or None for the fastest.
    """

    def __init__(self, moe: Any, spec: ExpertsSpec, name: str, backend_name: str | None) -> None:
        super().__init__(moe)
        self.spec = spec
        self.name = name
        self.backend_name = backend_name

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
        parallel = self.moe.moe_parallel_config
        layer.bwla = LocalExperts(spec, parallel.tp_rank, parallel.tp_size, backend)
        for prefix in ("w13", "w2"):
            for name, want in stacked_specs(num_experts, layer.bwla.projection(prefix)).items():
                parameter = Parameter(unset(want.shape, want.dtypes[0]), requires_grad=False)
                set_weight_attrs(parameter, {"weight_loader": ExpertLoader(layer, self.name, name)})
                layer.register_parameter(f"{prefix}_{name}", parameter)
        layer.bwla_tensors = ()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, repack for the backend, drop the rest.

        Raises:
            StartError: missing or invalid tensors.
        """
        local: LocalExperts = layer.bwla
        if layer.bwla_tensors:
            return  # Already repacked.
        stop_watching()
        with one_sentence():
            gate_up, down = (self._loaded(layer, prefix, local) for prefix in ("w13", "w2"))
            prepared = local.backend.prepare(gate_up, down, local.spec)
        for prefix, tensors in (("w13", gate_up), ("w2", down)):
            for name in tensors:
                delattr(layer, f"{prefix}_{name}")
        for name, tensor in prepared.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        mark_device(layer, "weight_packed", torch.int32)
        layer.bwla_tensors = tuple(prepared)

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
            FormatError: a bias, a limit of the activation, router weights that multiply the input, or another
                activation than that of the checkpoint.
        """
        advice = "convert the model again with --ignore experts"
        activation = getattr(self.moe.activation, "value", self.moe.activation)
        if activation != self.spec.activation:
            raise FormatError(
                f"{self.name}: expected activation {self.spec.activation}, found {activation}; {advice}"
            )
        options = ("has_bias", "swiglu_limit", "swiglu_alpha", "swiglu_beta")
        found = [name for name in options if getattr(self.moe, name, None)]
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
        names = stacked_specs(local.spec.experts, local.projection(prefix))
        tensors: dict[str, Tensor] = {name: getattr(layer, f"{prefix}_{name}").data for name in names}
        parts = ("w1", "w3") if prefix == "w13" else ("w2",)
        for name, tensor in tensors.items():
            if name in INPUT_TRANSFORM:
                if is_unset(tensor):
                    raise FormatError(f"{self.name}.{prefix}.{name}: not found in the checkpoint; {ADVICE}")
            else:
                for slot, one in enumerate(tensor):
                    for part, piece in zip(parts, one.chunk(len(parts)), strict=True):
                        if is_unset(piece):
                            expert = _global_number(layer, slot)
                            raise FormatError(
                                f"{self.name}.{expert}.{part}.{name}: not found in the checkpoint; {ADVICE}"
                            )
            problem = value_problem(name, tensor)
            if problem:
                raise FormatError(f"{self.name}.{prefix}.{name}: {problem}; {ADVICE}")
        return tensors


def _global_number(layer: Any, local: int) -> int:
    """Return the number in the checkpoint of this rank's expert `local`."""
    expert_map = layer.expert_map
    return local if expert_map is None else int((expert_map == local).nonzero()[0])
