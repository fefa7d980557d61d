"""The objective for several planes: short tails, as the fifth absolute moment of the rows measures them.

The levels of two and more planes are nearly evenly spaced, so that their distance, and with it the rounding error,
follows from the row's largest weights. Two peaks are of no use there: the levels between them would be wasted.

Objective. The mean of |w|^p, with every row in units of its own root mean square.

Algorithm. A rotation keeps the sum of squares, so that p/2 s w^2 - |w|^p has the same maximizer as -|w|^p. With the
curvature s = (p - 1) max|w|^(p-2) it is convex, and bounded from below by its tangent. Maximizing the tangent over one
Kronecker factor is an orthogonal Procrustes problem with the target s w - |w|^(p-2) w. This is the symmetric
fixed-point iteration of independent component analysis with a moment as the contrast (Hyvaerinen, "Fast and robust
fixed-point algorithms for independent component analysis", 1999), shifted as Kolda and Mayo shift the power method
(arXiv 1007.1267). max|w| is that of the rows before the round, so that a plain step decreases the moment unless it
makes one weight much larger.

Choices. The fifth moment leaves less error in 3 and 4 planes than the fourth, and as little in 2
(`python -m benchmarks.quality.okt`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from bwla_converter.quantize.okt.cells import mean_of_rows, rows_mean
from torch import Tensor

POWER = 5
"""Power p of the moment."""


@dataclass(frozen=True)
class MomentObjective:
    """The mean of |w|^p over the nonzero rows, each in units of its root mean square; an `Objective` of `rotation`.

    Attributes:
        curvature: s of the targets.
        power: p, at least 3.
    """

    name: ClassVar[str] = "moment"
    first_relaxation: ClassVar[float] = 1024.0

    curvature: float
    power: int = POWER

    @classmethod
    def start(cls, chunks: Sequence[Tensor], power: int = POWER) -> "MomentObjective":
        """Return the objective with the curvature at `chunks`."""
        return cls(_curvature(chunks, power), power)

    def fitted(self, chunks: Sequence[Tensor]) -> tuple["MomentObjective", float]:
        """Return the objective with the curvature at `chunks`, and its value there."""
        rows = [moments_of(chunk.flatten(0, 1), self.power) for chunk in chunks]
        value = mean_of_rows(rows, [moments > 0 for moments in rows])
        return replace(self, curvature=_curvature(chunks, self.power)), value

    def targets(self, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the Procrustes target of each chunk."""
        for chunk in chunks:
            yield chunk.abs().pow_(self.power - 2).neg_().add_(self.curvature).mul_(chunk)


def moments_of(cells: Tensor, power: int = POWER) -> Tensor:
    """Return the mean of |w|^p of each row of cells, float32 [P, N, Q]; row i is cells[:, i]. Returns float64 [N]."""
    return rows_mean(cells.abs().pow_(power - 2).mul_(cells).mul_(cells))


def _curvature(chunks: Sequence[Tensor], power: int) -> float:
    largest = max(float(chunk.abs().max()) for chunk in chunks)
    return (power - 1) * largest ** (power - 2)
