"""How one expert's stored tensors get into the parameters that collect those of all experts.

vLLM hands over one tensor of one expert at a time (`experts.3.gate_proj.weight_scale`), by the name of the parameter
that collects it for all experts (`w13_weight_scale`): w1 is the gate, w3 up, w2 down.
"""

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

from bwla_vllm.checks import ADVICE
from bwla_vllm.errors import one_sentence
from bwla_vllm.parameter import is_unset

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


class ExpertLoader:
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
