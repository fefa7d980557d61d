"""One stored linear: its sizes, its tensors, and the checks that a loader runs on them (see docs/format.md)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.factorize import PACK_FACTOR
from torch import Tensor

UNQUANTIZED_BITS = 16
"""Value of `bits` for unquantized activations: weight-only, for ablation and evaluation."""

ORTHOGONALITY_TOLERANCE = 1e-3
"""Largest allowed entry of |Q^T Q - I| for a stored rotation Q."""

MAX_PLANES = 4
"""Largest number of binary planes of a linear."""

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

SCALE_DTYPE = torch.bfloat16
ROTATION_DTYPE = torch.float16
"""Rounding to half precision changes an entry by at most 2^-11 of itself, so Q^T Q by at most 2^-10: within the
tolerance."""

INPUT_TRANSFORM = ("rotation_left", "rotation_right", "column_scale", "low_rank_a")
"""Tensors that every member of an input group stores an identical copy of."""

GROUP_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of the scales of groups of columns: they are imported, and keep the dtype that they were trained in."""

ROW_TENSORS = ("weight_packed", "weight_scale", "low_rank_b", "bias")
"""Tensors with one row for each output feature."""


@dataclass(frozen=True)
class LayerSpec:
    """Sizes and activation format of one linear y = x W^T + b.

    Attributes:
        out_features: N, any positive number.
        in_features: K, a multiple of 32.
        rotation_groups: G; each group of K / G = n1 * n2 columns (whole 32-bit words) is rotated and scaled on its own.
        n1, n2: orders of the two Kronecker factors of a group's rotation; 1 and the width of a group where `grouped`.
        rank: r of the low-rank correction, 0 for none.
        bits: activation bits, 2..8, or 16 for unquantized.
        clip: fraction of the largest magnitude that the largest code represents, in (0, 1].
        bias: whether the linear has a bias.
        planes: P, 1 to 4: the weight is a sum of P sign matrices, each with its own row scales.
        grouped: whether each row has a scale for each of the G groups of columns, and the layer no input transform:
            no rotation, no column scale and no low-rank correction. Activations are quantized for each group.

    Raises:
        FormatError: at construction, if the sizes contradict each other.
    """

    out_features: int
    in_features: int
    rotation_groups: int
    n1: int
    n2: int
    rank: int = 0
    bits: int = 6
    clip: float = 1.0
    bias: bool = False
    planes: int = 1
    grouped: bool = False

    def __post_init__(self) -> None:
        if (
            min(self.out_features, self.in_features, self.rotation_groups, self.n1, self.n2) < 1
            or self.rank < 0
        ):
            raise FormatError(f"sizes must be positive and the rank not negative, found {self}")
        if self.grouped and self.in_features % self.n2:
            raise FormatError(
                f"groups of {self.n2} columns do not divide the {self.in_features} that the layer reads"
            )
        if self.rotation_groups * self.n1 * self.n2 != self.in_features:
            raise FormatError(
                f"rotation ({self.rotation_groups}, {self.n1}, {self.n2}) covers "
                f"{self.rotation_groups * self.n1 * self.n2} columns, but the layer reads {self.in_features}"
            )
        if self.group_width % PACK_FACTOR:
            raise FormatError(
                f"a rotation group must be a multiple of {PACK_FACTOR} columns wide, found {self.group_width}"
            )
        if self.grouped and (self.n1 != 1 or self.rank):
            raise FormatError(
                f"a layer with scales for groups of columns has no rotation and no low-rank correction, found {self}"
            )
        if not 1 <= self.planes <= MAX_PLANES:
            raise FormatError(f"planes must be 1..{MAX_PLANES}, found {self.planes}")
        if not 0.0 < self.clip <= 1.0:
            raise FormatError(f"clip must lie in (0, 1], found {self.clip}")
        if self.bits != UNQUANTIZED_BITS and not 2 <= self.bits <= 8:
            raise FormatError(f"activation bits must be 2..8 or {UNQUANTIZED_BITS}, found {self.bits}")

    @property
    def group_width(self) -> int:
        """Columns of one rotation group, n1 * n2."""
        return self.n1 * self.n2

    @property
    def scales_per_row(self) -> int:
        """Scales that each plane of a row has: one, or one for each group of columns."""
        return self.rotation_groups if self.grouped else 1

    @property
    def q_max(self) -> int:
        """Largest activation code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a stored tensor and the dtypes it may have."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


def tensor_specs(spec: LayerSpec) -> dict[str, TensorSpec]:
    """Return the tensors that a layer stores, in a fixed order; those of a single plane have no axis for it."""
    n, k, r = spec.out_features, spec.in_features, spec.rank
    row = (n,) if spec.planes == 1 else (n, spec.planes)
    specs = {"weight_packed": TensorSpec((*row, k // PACK_FACTOR), (torch.int32,))}
    if spec.grouped:
        specs["weight_scale"] = TensorSpec((*row, spec.rotation_groups), GROUP_SCALE_DTYPES)
    else:
        specs |= {
            "weight_scale": TensorSpec(row, (SCALE_DTYPE,)),
            "rotation_left": TensorSpec((spec.rotation_groups, spec.n1, spec.n1), (ROTATION_DTYPE,)),
            "rotation_right": TensorSpec((spec.rotation_groups, spec.n2, spec.n2), (ROTATION_DTYPE,)),
            "column_scale": TensorSpec((k,), (SCALE_DTYPE,)),
        }
    if r:
        specs["low_rank_a"] = TensorSpec((r, k), (torch.bfloat16,))
        specs["low_rank_b"] = TensorSpec((n, r), (torch.bfloat16,))
    if spec.bias:
        specs["bias"] = TensorSpec((n,), FLOAT_DTYPES)
    return specs


def loading_dtype(want: TensorSpec) -> torch.dtype:
    """Return the dtype in which loaders keep a tensor before its own is known: one that holds its values exactly."""
    return torch.float32 if want.dtypes == GROUP_SCALE_DTYPES else want.dtypes[0]


def storage_dtype(want: TensorSpec, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of this dtype is stored: its own where the format allows it."""
    return dtype if dtype in want.dtypes else want.dtypes[0]


def to_storage_dtype(tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """Return copies of a layer's tensors in the format's order and dtypes.

    A tensor that may have several dtypes, such as a bias, keeps its own if it is one of them. A bias may be left out.
    """
    wanted = {key: want for key, want in tensor_specs(spec).items() if key in tensors or key != "bias"}
    dtypes = {key: storage_dtype(want, tensors[key].dtype) for key, want in wanted.items()}
    return {
        key: tensors[key].to(dtype, copy=True, memory_format=torch.contiguous_format)
        for key, dtype in dtypes.items()
    }


def to_compute_dtype(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert rotations and scales to float32, which kernels read; return everything else as it is."""
    names = ("weight_scale", "rotation_left", "rotation_right", "column_scale")
    return {key: tensor.float() if key in names else tensor for key, tensor in tensors.items()}


def shape_problem(want: TensorSpec, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Describe how a shape and dtype differ from those of the format; return None if they agree."""
    if dtype not in want.dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in want.dtypes)
        return f"expected dtype {names}, found {str(dtype).removeprefix('torch.')}"
    if shape != want.shape:
        return f"expected shape {list(want.shape)}, found {list(shape)}"
    return None


def value_problem(name: str, tensor: Tensor, grouped: bool = False) -> str | None:
    """Describe what is wrong with the values of the tensor called `name`; return None if nothing is.

    Args:
        name: the tensor's name in its layer.
        tensor: the tensor.
        grouped: whether the layer is grouped: a group of columns that are all zero has scale 0.
    """
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        return "expected finite values, found NaN or infinity"
    if grouped and not (tensor >= 0).all():
        return f"expected scales that are not negative, found {tensor.min().item():g}"
    if not grouped and name in ("weight_scale", "column_scale") and not (tensor > 0).all():
        return f"expected positive scales, found {tensor.min().item():g}"
    if name in ("rotation_left", "rotation_right"):
        exact = tensor.double()  # float32 products may be TF32, whose error is near the tolerance
        gram = exact.transpose(-1, -2) @ exact
        off = (gram - torch.eye(tensor.shape[-1], device=tensor.device)).abs().max().item()
        if off > ORTHOGONALITY_TOLERANCE:
            return f"expected an orthogonal matrix to {ORTHOGONALITY_TOLERANCE:g}, found it off by {off:.3g}"
    return None


def describe_kind(spec: LayerSpec) -> str:
    """Say what decides which tensors a layer stores, for messages."""
    return f"scales for groups of {spec.group_width} columns" if spec.grouped else f"rank {spec.rank}"


def validate_layer(name: str, tensors: Mapping[str, Tensor], spec: LayerSpec) -> None:
    """Check everything that a backend relies on; `name` is the layer's module path, for the message.

    Raises:
        FormatError: missing, extra or misshapen tensors, wrong dtypes, non-finite values,
            non-positive scales, rotations that are not orthogonal to 1e-3.
    """
    expected = tensor_specs(spec)
    advice = "the checkpoint is damaged or was written by another version: convert or download it again"
    for missing in sorted(expected.keys() - tensors.keys()):
        raise FormatError(f"{name}.{missing}: expected {expected[missing]}, found no such tensor; {advice}")
    for extra in sorted(tensors.keys() - expected.keys()):
        raise FormatError(
            f"{name}.{extra}: not a tensor of this layer's format ({describe_kind(spec)}); {advice}"
        )
    for key, want in expected.items():
        tensor = tensors[key]
        grouped = spec.grouped and key == "weight_scale"
        problem = shape_problem(want, tuple(tensor.shape), tensor.dtype) or value_problem(
            key, tensor, grouped
        )
        if problem:
            raise FormatError(f"{name}.{key}: {problem}; {advice}")
