"""The shapes that a recipe's memory and compute estimates depend on, and the form that the estimates have."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from bwla_converter.common.bits import num_weights
from bwla_converter.common.tensors import entry_bytes
from bwla_converter.options import Calibration
from bwla_converter.quantize.okt.rotation import WEIGHTS_PER_PARAMETER
from bwla_converter.source.model import Source
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.experts import expert_of, kind_of
from bwla_kernels.format.folder import text_settings
from bwla_kernels.precision import product_dtype

FLOAT_BYTES = 4

CHOSEN_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "experts_top_k",
)
"""Names that models' configs have for the number of experts that a token is sent to."""

WORKSPACE_BYTES = 160e6
"""Memory for what is processed in pieces: chunks of rows, statistics, files being written."""


@dataclass(frozen=True)
class GroupShape:
    """An input group's pooled weight: rows N of all its linears, columns K, and P planes to approximate it with.

    Attributes:
        experts: number of experts among its linears.
        own_moments: whether each of them has moments of its own.
        used: share of the rows that a token is multiplied with.
    """

    rows: int
    columns: int
    planes: int = 1
    experts: int = 0
    own_moments: bool = False
    used: float = 1.0

    @property
    def weights(self) -> int:
        """N * K."""
        return self.rows * self.columns

    @property
    def square(self) -> int:
        """K * K, the elements of a Hessian."""
        return self.columns**2

    @property
    def used_rows(self) -> float:
        """Rows that a token is multiplied with."""
        return self.rows * self.used

    @property
    def factorizations(self) -> int:
        """Number of Hessians that are factorized."""
        return 1 + self.experts * self.own_moments


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer.

    Attributes:
        index: its number.
        stored_bytes: size of its tensors in the checkpoint.
        weights: elements of all its tensors.
        groups: its input groups, in execution order, each with the name of its first linear inside the layer.
        kept_columns: input features of the linears whose inputs a calibration loop keeps, see
            `calibration.stepwise`.
    """

    index: int
    stored_bytes: int
    weights: int
    groups: tuple[tuple[str, GroupShape], ...]
    kept_columns: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that a conversion allocates in one of its steps, hidden states of the samples not included."""

    num_bytes: float
    step: str


@dataclass(frozen=True)
class ComputeEstimate:
    """Work of a conversion.

    Attributes:
        flops: floating-point operations of matrix products in float32.
        bytes_moved: bytes that element-wise work reads and writes.
        fast_flops: floating-point operations of the products for which `precision.fast_products` applies.
    """

    flops: float = 0.0
    bytes_moved: float = 0.0
    fast_flops: float = 0.0

    def __add__(self, other: "ComputeEstimate") -> "ComputeEstimate":
        return ComputeEstimate(
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.fast_flops + other.fast_flops,
        )


@dataclass(frozen=True)
class Workload:
    """A conversion, as far as its cost depends on it.

    Attributes:
        source: the model.
        specs: the spec of every linear to quantize.
        rank: rank of the low-rank correction.
        calibration: the calibration data; None for a recipe that uses none.
        device: type of the device that computes.
        models: models through which the calibration samples run.
        tune_epochs, distill_epochs: epochs of tuning and of distillation; None for the recipe's default.
    """

    source: Source
    specs: Mapping[str, LayerSpec]
    rank: int
    calibration: Calibration | None
    device: str = "cpu"
    models: int = 2
    tune_epochs: int | None = None
    distill_epochs: int | None = None

    @property
    def weights(self) -> int:
        """Weights to quantize."""
        return sum(map(num_weights, self.specs.values()))

    @property
    def tokens(self) -> int:
        """Tokens of all calibration samples."""
        return self.calibration.num_samples * self.calibration.max_seq_length if self.calibration else 0

    def batch_tokens(self, batch: int) -> int:
        """Return the tokens of `batch` calibration samples, or of all where there are fewer."""
        if self.calibration is None:
            return 0
        return min(batch, self.calibration.num_samples) * self.calibration.max_seq_length

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of all calibration samples in one model, float32."""
        return FLOAT_BYTES * self.tokens * self.source.entries[self.source.embedding_weight].shape[1]

    @property
    def kept_bytes(self) -> int:
        """Inputs of linears that a calibration loop keeps for each model while it quantizes a layer."""
        itemsize = product_dtype(torch.device(self.device)).itemsize
        columns = max((layer.kept_columns for layer in self.distinct_layers()), default=0)
        return self.models * itemsize * self.tokens * columns

    def layer(self, index: int) -> LayerShape:
        """Return the shape of decoder layer `index`."""
        groups, kept_columns = [], 0
        for group, names in self.source.groups_of_layer(index):
            shape = self._shape(names)
            groups.append((kind_of(names[0]), shape))
            # A guess, because no layer has run yet. Those of experts are not kept.
            kept_columns += shape.columns * (group.input_sharded and not shape.experts)
        entries = [self.source.entries[name] for name in self.source.names_of_layer(index)]
        weights = sum(math.prod(entry.shape) for entry in entries)
        return LayerShape(index, sum(map(entry_bytes, entries)), weights, tuple(groups), kept_columns)

    def _shape(self, names: Sequence[str]) -> GroupShape:
        specs = {name: self.specs[name] for name in names}
        rows, first = sum(spec.out_features for spec in specs.values()), specs[names[0]]
        of_experts = [spec.out_features for name, spec in specs.items() if expert_of(name) is not None]
        if not of_experts:
            return GroupShape(rows, first.in_features, first.planes)
        count = len({expert_of(name) for name in specs} - {None})
        used = (rows - sum(of_experts) * (1 - self.chosen_experts / count)) / rows
        # Gate and up of an expert read the same, its down projection stands alone.
        return GroupShape(
            rows, first.in_features, first.planes, count, len(of_experts) == count, min(used, 1.0)
        )

    @cached_property
    def chosen_experts(self) -> int:
        """Number of experts that a token is sent to, by the model's config; all of them where it does not say."""
        settings = text_settings(self.source.config)
        found = (settings.get(key) for key in CHOSEN_EXPERTS)
        return next((count for count in found if isinstance(count, int)), sys.maxsize)

    def distinct_layers(self) -> Iterator[LayerShape]:
        """Yield the first layer of each shape; others with the same shape need the same memory."""
        known = set()
        for index in range(self.source.num_layers):
            layer = self.layer(index)
            if layer.groups not in known:
                known.add(layer.groups)
                yield layer

    def groups(self) -> Iterator[GroupShape]:
        """Yield the input groups of all layers."""
        for index in range(self.source.num_layers):
            for _, group in self.layer(index).groups:
                yield group


def okt_compute(group: GroupShape, rounds: int) -> ComputeEstimate:
    """Estimate the work of learning the rotation of an input group."""
    rotation_width = 2 * math.isqrt(group.columns)  # n1 + n2 of a single rotation group
    weights = min(group.weights, WEIGHTS_PER_PARAMETER * rotation_width**2 // 2)
    flops = 8 * rounds * weights * rotation_width / 2
    return ComputeEstimate(flops, 32 * FLOAT_BYTES * rounds * weights)


def psp_compute(group: GroupShape, rank: int, rounds: int) -> ComputeEstimate:
    """Estimate the work of fitting the low-rank correction of an input group."""
    flops = 20 * rounds * group.weights * (rank + 8)
    return ComputeEstimate(flops, 28 * FLOAT_BYTES * rounds * group.weights)
