"""`BWLAExpertsMethod`: allocate, load and compute the one-bit experts of a mixture-of-experts layer in vLLM.

vLLM hands over one tensor of one expert at a time (`experts.3.gate_proj.weight_scale`), by the name of the parameter
that collects it for all experts (`w13_weight_scale`): w1 is the gate, w3 up, w2 down.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.spec import stacked_specs
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import INPUT_TRANSFORM, TensorSpec, shape_problem, value_problem
from bwla_kernels.ops import ExpertsBackend, select_experts_backend
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from bwla_vllm.checks import ADVICE, check_rotation_groups
from bwla_vllm.errors import one_sentence
from bwla_vllm.head import stop_watching
from bwla_vllm.parameter import is_unset, mark_device, unset

logger = init_logger("vllm.bwla")

DOWN_SHARD_DIM = {
    "weight_packed": -1,
    "rotation_left": 0,
    "rotation_right": 0,
    "column_scale": 0,
    "low_rank_a": 1,
}
"""Dimension of a tensor of down that tensor parallelism shards; it has whole rotation groups on each rank."""


@dataclass(frozen=True)
class LocalExperts:
    """The experts as this rank loads and computes them.

    Attributes:
        spec: sizes of this rank's shard: its experts, and its part of each expert's intermediate values.
        rank: this tensor-parallel rank.
        size: number of tensor-parallel ranks.
        backend: backend that computes them.
    """

    spec: ExpertsSpec
    rank: int
    size: int
    backend: ExpertsBackend

    def projection(self, prefix: str) -> LayerSpec:
        """Return the sizes of this rank's shard of gate and up (w13), or of down (w2)."""
        return self.spec.gate_up if prefix == "w13" else self.spec.down


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
                set_weight_attrs(parameter, {"weight_loader": _Loader(layer, self.name, name)})
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


class _Loader:
    """Copies one expert's tensor into the parameter of all experts; vLLM calls it with the arguments named below."""

    def __init__(self, layer: Any, label: str, tensor: str) -> None:
        self.layer = layer
        self.label = label
        self.tensor = tensor

    def __call__(
        self,
        param: Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Load `loaded_weight`, the whole tensor of linear `shard_id` (w1, w2 or w3) of expert `expert_id`.

        Returns: whether this rank keeps it, if `return_success`.

        Raises:
            StartError: another shape or dtype, or a copy of the input transform that differs from another expert's.
        """
        local: LocalExperts = self.layer.bwla
        slot = self.layer._map_global_expert_id_to_local_expert_id(expert_id)
        where = f"{self.label}.{expert_id}.{shard_id}.{self.tensor}"
        with one_sentence():
            piece = self._own_piece(where, param.data, loaded_weight, shard_id, local)
            if self.tensor in INPUT_TRANSFORM:
                self._load_shared(where, param.data, piece)
            elif slot >= 0:
                rows = param.data[slot]
                if shard_id != "w2":
                    rows = rows.chunk(2)[0 if shard_id == "w1" else 1]
                rows.copy_(piece)
        kept = slot >= 0 or self.tensor in INPUT_TRANSFORM
        return kept if return_success else None

    def _own_piece(
        self, where: str, data: Tensor, loaded: Tensor, shard_id: str, local: LocalExperts
    ) -> Tensor:
        """Check dtype and full size of a tensor, and return this rank's shard of it."""
        shape = list(data.shape if self.tensor in INPUT_TRANSFORM else data.shape[1:])
        dim: int | None
        if shard_id == "w2":
            dim = DOWN_SHARD_DIM.get(self.tensor)
        else:
            dim = None if self.tensor in INPUT_TRANSFORM else 0
            if dim == 0:
                shape[0] //= 2
        own = shape[dim] if dim is not None else 0
        if dim is not None:
            shape[dim] = own * local.size
        problem = shape_problem(TensorSpec(tuple(shape), (data.dtype,)), tuple(loaded.shape), loaded.dtype)
        if problem:
            raise FormatError(f"{where}: {problem}; {ADVICE}")
        return loaded if dim is None else loaded.narrow(dim, local.rank * own, own)

    def _load_shared(self, where: str, data: Tensor, piece: Tensor) -> None:
        """Keep the first copy of the input transform, and compare the others with it."""
        if is_unset(data):
            data.copy_(piece)
        elif not torch.equal(data, piece.to(data.device)):
            raise FormatError(
                f"{where}: expected the values of the layer's other experts, which share the input transform, found "
                "different ones; convert the model again with one rotation for all experts"
            )


def _global_number(layer: Any, local: int) -> int:
    """Return the number in the checkpoint of this rank's expert `local`."""
    expert_map = layer.expert_map
    return local if expert_map is None else int((expert_map == local).nonzero()[0])
