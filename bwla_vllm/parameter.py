"""Parameters into which a layer's stored tensors are loaded.

vLLM's stock parameters cast while copying and narrow without checking the full size: a float tensor in place of packed
words and a tensor of a wider model load silently. These parameters refuse both, for checkpoints whose headers could not
be checked beforehand. They follow vLLM's loader protocol, version 2: the layer decides which of
`load_column_parallel_weight`, `load_row_parallel_weight`, `load_merged_column_weight` and `load_qkv_weight`
to call, the parameter narrows.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import PACK_FACTOR
from bwla_kernels.format.layer import TensorSpec, shape_problem
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)

from bwla_vllm.errors import one_sentence

UNSET_WORD = 0x5A3C96E1
"""Value of the sign words before loading; no trained row repeats the same 32 signs over its whole width."""


def unset(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that validation refuses: NaN, or a repeated word where the dtype has no NaN."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else UNSET_WORD, dtype=dtype)


def is_unset(tensor: Tensor) -> bool:
    """Return whether nothing was loaded into a tensor made by `unset`."""
    holes = tensor.isnan() if tensor.is_floating_point() else tensor == UNSET_WORD
    return bool(holes.all())


def replace_parameters(layer: Any, stored: Iterable[str], prepared: Mapping[str, Tensor]) -> None:
    """Replace the stored tensors of a layer by those that its backend made of them, named in `layer.bwla_tensors`.

    Args:
        layer: vLLM's layer.
        stored: names of its parameters.
        prepared: the backend's tensors by the names that they get.
    """
    for name in stored:
        delattr(layer, name)
    for name, tensor in prepared.items():
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))
    layer.bwla_tensors = tuple(prepared)


def mark_device(layer: Any, name: str, dtype: torch.dtype) -> None:
    """Register an empty buffer under a name by which vLLM finds the device and dtype of a layer's weights.

    LoRA wrappers look for `weight`, `weight_packed` and some others (vllm/lora/layers/utils.py), of which none is left
    after repacking. The buffer is not part of the state dict; code that multiplies by it fails on its shape.
    """
    if hasattr(layer, name):
        return
    device = next(layer.parameters()).device
    layer.register_buffer(name, torch.empty(0, dtype=dtype, device=device), persistent=False)


class CheckedParameter(BasevLLMParameter):  # type: ignore[misc]
    """A parameter that refuses tensors of another dtype or full size, naming itself.

    Args:
        label: layer and tensor, for messages.
        kwargs: what vLLM's parameter classes take (`data`, `weight_loader`, dimensions).
    """

    def __init__(self, *, label: str, **kwargs: Any) -> None:
        self.label = label
        super().__init__(**kwargs)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that may be loaded."""
        return (self.dtype,)

    def refuse_other(self, loaded: Tensor, shape: tuple[int, ...], part: str | int | None = None) -> None:
        """Raise unless `loaded` has a dtype of this parameter and the full (unsharded) shape `shape`.

        Raises:
            StartError: another shape or dtype.
        """
        problem = shape_problem(TensorSpec(shape, self.dtypes), tuple(loaded.shape), loaded.dtype)
        if problem:
            where = self.label if part is None else f"{self.label} (part {part})"
            with one_sentence():
                raise FormatError(
                    f"{where}: {problem}; the checkpoint does not belong to this model or was written by "
                    "another version: convert or download it again"
                )

    def load_replicated_weight(self, loaded_weight: Tensor) -> None:
        """Load a tensor that every tensor-parallel rank holds in full."""
        self.refuse_other(loaded_weight, tuple(self.data.shape))
        self.data.copy_(loaded_weight)


class RowsParameter(CheckedParameter):
    """Checks tensors with one entry per output row along dim 0; combined with a vLLM class that loads them."""

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        rows, *rest = self.data.shape
        self.refuse_other(loaded_weight, (rows * self.tp_size, *rest))
        super().load_column_parallel_weight(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        rows = kwargs["shard_size"] * self.tp_size
        self.refuse_other(loaded_weight, (rows, *self.data.shape[1:]), kwargs["shard_id"])
        super().load_merged_column_weight(loaded_weight, **kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        # `num_heads` is the number of tensor-parallel ranks that hold a copy of the same key and value heads.
        copies = 1 if kwargs["shard_id"] == "q" else kwargs["num_heads"]
        rows = kwargs["shard_size"] * self.tp_size // copies
        self.refuse_other(loaded_weight, (rows, *self.data.shape[1:]), kwargs["shard_id"])
        super().load_qkv_weight(loaded_weight, **kwargs)


class ScaleParameter(RowsParameter, ChannelQuantScaleParameter):  # type: ignore[misc]
    """`weight_scale` [N] or [N, P], and `low_rank_b` [N, r].

    Sharded along N, or replicated where the input is sharded.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(output_dim=0, **kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.load_replicated_weight(loaded_weight)


class GroupScaleParameter(ScaleParameter):
    """`weight_scale` [N, G] or [N, P, G] of a layer with scales for groups of columns: sharded along N or G.

    Args:
        dtypes: the dtypes that may be loaded; the parameter has one that holds their values exactly.
    """

    def __init__(self, *, dtypes: tuple[torch.dtype, ...], **kwargs: Any) -> None:
        self._dtypes = dtypes
        super().__init__(**kwargs)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return self._dtypes

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        *rows, groups = self.data.shape
        self.refuse_other(loaded_weight, (*rows, groups * self.tp_size))
        self.data.copy_(loaded_weight.narrow(-1, self.tp_rank * groups, groups))


class SignsParameter(RowsParameter, PackedvLLMParameter):  # type: ignore[misc]
    """`weight_packed` [N, K / 32] or [N, P, K / 32]: sharded along N, or by whole words along K."""

    def __init__(self, **kwargs: Any) -> None:
        last = kwargs["data"].dim() - 1
        super().__init__(input_dim=last, output_dim=0, packed_dim=last, packed_factor=PACK_FACTOR, **kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        *rows, words = self.data.shape
        self.refuse_other(loaded_weight, (*rows, words * self.tp_size))
        super().load_row_parallel_weight(loaded_weight)


class SharedParameter(CheckedParameter, PerTensorScaleParameter):  # type: ignore[misc]
    """A tensor of the input transform, of which every part of a fused layer (q, k, v; gate, up) stores its own copy.

    One slot per part, [parts, ...]: if the copies were loaded over each other, vLLM's weight reloading would count
    the layer as complete too early. Like vLLM's `PerTensorScaleParameter` it also accepts a tensor of a layer that is
    stored fused: vLLM then fills all slots with it.

    Args:
        shard_dim: dimension of the stored tensor that is sharded in layers sharded along their input.
    """

    def __init__(self, *, shard_dim: int, **kwargs: Any) -> None:
        self.shard_dim = shard_dim
        super().__init__(**kwargs)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._load_into_shard_id(loaded_weight, 0)

    def load_replicated_weight(self, loaded_weight: Tensor) -> None:
        self._load_into_shard_id(loaded_weight, 0)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        slot = self.data[0]
        full, size = list(slot.shape), slot.shape[self.shard_dim]
        full[self.shard_dim] *= self.tp_size
        self.refuse_other(loaded_weight, tuple(full))
        slot.copy_(loaded_weight.narrow(self.shard_dim, self.tp_rank * size, size))

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **kwargs: Any) -> None:
        slot = self.data[self._shard_id_as_int(shard_id)]
        self.refuse_other(loaded_weight, tuple(slot.shape), shard_id if len(self.data) > 1 else None)
        slot.copy_(loaded_weight)

    def copies_agree(self) -> bool:
        """Return whether all slots hold the same values."""
        return all(torch.equal(self.data[0], copy) for copy in self.data[1:])
