"""How one expert's stored tensors get into the parameters that collect those of all experts.

vLLM hands over one tensor of one expert at a time (`experts.3.gate_proj.weight_scale`), by the name of the parameter
that collects it for all experts (`w13_weight_scale`): w1 is the gate, w3 up, w2 down.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import INPUT_TRANSFORM, TensorSpec, shape_problem
from bwla_kernels.ops import ExpertsBackend
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.utils import set_weight_attrs

from bwla_vllm.checks import ADVICE
from bwla_vllm.errors import one_sentence
from bwla_vllm.parameter import unset

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
        dummy: whether to replace the first load by placeholder tensors.
    """

    spec: ExpertsSpec
    rank: int
    size: int
    backend: ExpertsBackend
    dummy: bool = False

    def projection(self, prefix: str) -> LayerSpec:
        """Return the sizes of this rank's shard of gate and up (w13), or of down (w2)."""
        return self.spec.gate_up if prefix == "w13" else self.spec.down


def make_parameter(layer: Any, label: str, prefix: str, name: str, want: TensorSpec) -> Parameter:
    """Return the parameter that collects a tensor of all experts, filled with values that validation refuses.

    The input transform, which experts share, has a slot for each linear of expert 0 that stores a copy, [2, ...] for
    gate and up: if copies were loaded over each other, vLLM's weight reloading would count the layer as complete too
    early.

    Args:
        layer: vLLM's layer of routed experts; `layer.bwla` describes what it loads.
        label: its name, for messages.
        prefix: w13 for gate and up, w2 for down.
        name: the tensor's name in the format.
        want: its shape for this rank's experts, from `stacked_specs`.
    """
    shape = want.shape
    if name in INPUT_TRANSFORM:
        shape = (2 if prefix == "w13" else 1, *shape)
    parameter = Parameter(unset(shape, want.dtypes[0]), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": expert_loader(layer, label, name)})
    return parameter


def expert_loader(layer: Any, label: str, tensor: str) -> Callable[..., bool | None]:
    """Return the function that copies one expert's tensor into the parameter of all experts.

    It does not keep the layer alive: vLLM's weight reloading stores it for longer.
    """
    local: LocalExperts = layer.bwla
    owner = weakref.ref(layer)

    def load(
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
            StartError: another shape or dtype, or an input transform that is not stored with expert 0.
        """
        current = owner()
        assert current is not None  # vLLM loads into the layer that has the parameter
        slot = current._map_global_expert_id_to_local_expert_id(expert_id)
        where = f"{label}.{expert_id}.{shard_id}.{tensor}"
        shared = tensor in INPUT_TRANSFORM
        with one_sentence():
            if shared and expert_id != 0:
                raise FormatError(
                    f"{where}: expected the input transform with expert 0 only, which stores it for all experts of a "
                    f"layer, found it with another one; {ADVICE}"
                )
            dim = _shard_dim(tensor, shard_id)
            own = param.data[0]
            if not shared and shard_id != "w2":
                own = own.chunk(2)[0]
            piece = _own_piece(where, own, loaded_weight, dim, local)
            if tensor == "bias" and shard_id == "w2" and local.rank > 0:
                piece = torch.zeros_like(piece)  # the ranks' results are added up
        if shared:
            param.data[1 if shard_id == "w3" else 0].copy_(piece)
        elif slot >= 0:
            rows = param.data[slot]
            if shard_id != "w2":
                rows = rows.chunk(2)[0 if shard_id == "w1" else 1]
            rows.copy_(piece)
        return (shared or slot >= 0) if return_success else None

    return load


def _shard_dim(tensor: str, shard_id: str) -> int | None:
    """Return the dimension of one expert's tensor that tensor parallelism shards, or None."""
    if shard_id == "w2":
        return DOWN_SHARD_DIM.get(tensor)
    return None if tensor in INPUT_TRANSFORM else 0


def _own_piece(where: str, own: Tensor, loaded: Tensor, dim: int | None, local: LocalExperts) -> Tensor:
    """Check dtype and full size of a tensor, and return this rank's shard of it, which has the shape of `own`."""
    shape = list(own.shape)
    if dim is not None:
        shape[dim] *= local.size
    problem = shape_problem(TensorSpec(tuple(shape), (own.dtype,)), tuple(loaded.shape), loaded.dtype)
    if problem:
        raise FormatError(f"{where}: {problem}; {ADVICE}")
    return loaded if dim is None else loaded.narrow(dim, local.rank * own.shape[dim], own.shape[dim])
