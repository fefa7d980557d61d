"""The objective for several planes: short tails, as the fifth absolute moment of the rows measures them.

The levels of two and more planes are nearly evenly spaced. Their distance, and with it the rounding error, grows with
the row's largest weights; two peaks are of little use, because there are levels between them.

Objective. The mean of |w|^p, with every row in units of its own root mean square.

Algorithm. A rotation keeps the sum of squares, so that minimizing |w|^p / p is maximizing s w^2 / 2 - |w|^p / p. With
s = (p - 1) m^(p-2), where m is the largest |w|, that function is convex between -m and m, and its tangent bounds it
from below there. Maximizing the tangent over one Kronecker factor is an orthogonal Procrustes problem with the target
s w - |w|^(p-2) w. m is that of the rows before the round, so that a plain round does not increase the moment as long
as no weight exceeds it. The iteration resembles the fixed-point iteration of independent component analysis with a
moment as the contrast (Hyvaerinen, "Fast and robust fixed-point algorithms for independent component analysis", 1999),
shifted as Kolda and Mayo shift the power method (arXiv 1007.1267).

Choices (`python -m benchmarks.quality.okt`). The sixth moment leaves less error than the fifth in 4 planes and more
in 2. One s for all rows and groups makes plain steps tiny, which over-relaxation makes up for; one for each row and
group, the least that the bound needs, was not better with it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
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
        name: see `Objective`.
        first_relaxation: see `Objective`. The largest weight of all sets s, so that plain steps hardly move anything.
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
        """Yield the Procrustes target of each chunk [G, n1, rows, n2], float32 in its shape."""
        for chunk in chunks:
            yield chunk.abs().pow_(self.power - 2).neg_().add_(self.curvature).mul_(chunk)


def moments_of(cells: Tensor, power: int = POWER) -> Tensor:
    """Return the mean of |w|^p of each row of cells, float64 [N].

    Args:
        cells: float32 [P, N, Q]; row i is cells[:, i].
        power: p.
    """
    return rows_mean(cells.abs().pow_(power - 2).mul_(cells).mul_(cells))


def _curvature(chunks: Sequence[Tensor], power: int) -> float:
    largest = [torch.linalg.vector_norm(chunk, math.inf) for chunk in chunks if chunk.numel()]
    return (power - 1) * float(torch.stack(largest).max()) ** (power - 2) if largest else 0.0
