"""Weights that have one bit or three values already: the same weights in binary planes, without loss.

In every group of columns such a weight holds +d and -d, or +d, 0 and -d: models that are trained in one bit (Bonsai) or
three values (BitNet b1.58, arXiv 2402.17764; Falcon-E). One value d becomes the scale of a plane; three values become
two planes with scale d / 2, whose signs differ where the weight is 0.
"""

from dataclasses import dataclass

import torch
from bwla_converter.common.tensors import split_rows
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, pack_signs, tensor_specs
from bwla_kernels.format.layer import GROUP_SCALE_DTYPES
from torch import Tensor

GROUP_SIZES = (256, 128, 64, 32)
"""Sizes of groups that are looked for, where the columns of a row do not form a single one."""


@dataclass(frozen=True)
class Groups:
    """How a weight can be stored without loss.

    Attributes:
        planes: 1 for two values in each group of columns, 2 for three.
        size: columns of a group.
    """

    planes: int
    size: int

    def together(self, other: "Groups") -> "Groups":
        """Return how both weights can be stored in the same way."""
        return Groups(max(self.planes, other.planes), min(self.size, other.size))


def find_groups(weight: Tensor) -> Groups | None:
    """Return how a weight [N, K] can be stored without loss, in as large groups as possible; None if it cannot."""
    columns = weight.shape[1]
    for size in (columns, *(size for size in GROUP_SIZES if size < columns)):
        planes = 0 if columns % size or size % 32 else _planes(weight, size)
        if planes:
            return Groups(planes, size)
    return None


def _planes(weight: Tensor, size: int) -> int:
    """Return the number of planes for groups of `size` columns; 0 if they hold more than three values."""
    planes = 1
    for rows in split_rows(weight):
        magnitude = rows.abs().unflatten(1, (-1, size))
        largest = magnitude.amax(-1, keepdim=True)
        is_zero = magnitude == 0
        if not bool(((magnitude == largest) | is_zero).all()):
            return 0
        if bool((is_zero & (largest > 0)).any()):
            planes = 2
    return planes


def store_lossless(name: str, weight: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
    """Return the tensors of a linear, without its bias, that stand for exactly the given weight.

    Args:
        name: the linear's module path, for messages.
        weight: [N, K], any float dtype; finite.
        spec: its spec, grouped, with one or two planes.

    Raises:
        SourceError: the weight holds other values than such planes can express.
    """
    words, scales, first = [], [], 0
    for rows in split_rows(weight):
        signs, scale = _decompose(rows.float(), spec)
        cells = signs.unflatten(-1, (spec.rotation_groups, -1))
        found = (cells * scale.unsqueeze(-1)).sum(1).flatten(1)
        if not torch.equal(found, rows.float()):
            raise SourceError(f"{name}.weight: {_difference(rows, found, spec, first)}")
        words.append(pack_signs(signs))
        scales.append(scale)
        first += len(rows)
    shapes = tensor_specs(spec)
    scale = torch.cat(scales)
    return {
        "weight_packed": torch.cat(words).view(shapes["weight_packed"].shape),
        "weight_scale": _narrowest(scale).view(shapes["weight_scale"].shape),
    }


def _difference(rows: Tensor, found: Tensor, spec: LayerSpec, first: int) -> str:
    """Describe the first group of columns that the planes cannot express; `first` is the number of the first row."""
    row, column = (found != rows).nonzero()[0].tolist()
    start = column // spec.group_width * spec.group_width
    group = rows[row, start : start + spec.group_width].abs().unique().tolist()
    values = ", ".join(f"{value:g}" for value in group[:3]) + (", ..." if len(group) > 3 else "")
    expected = "three values, +d, 0 and -d," if spec.planes == 2 else "two values, +d and -d,"
    return (
        f"expected {expected} in each group of {spec.group_width} columns, as in other layers, found the magnitudes "
        f"{values} in row {first + row}, columns {start} to {start + spec.group_width - 1}: use --recipe fast, which "
        "quantizes any weight"
    )


def _decompose(rows: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return signs, float32 [N, P, K], and scales [N, P, G] that add up to `rows` if they can."""
    largest = rows.abs().unflatten(1, (spec.rotation_groups, -1)).amax(-1)
    positive, negative = (rows >= 0).float() * 2 - 1, (rows > 0).float() * 2 - 1
    signs = torch.stack([positive, negative][: spec.planes], 1)
    return signs, (largest / spec.planes).unsqueeze(1).expand(-1, spec.planes, -1)


def _narrowest(scale: Tensor) -> Tensor:
    """Return scales in the first dtype of the format that holds them exactly."""
    exact = (dtype for dtype in GROUP_SCALE_DTYPES if torch.equal(scale.to(dtype).float(), scale))
    return scale.to(next(exact)).contiguous()
