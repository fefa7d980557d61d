"""The objective for one plane: the likelihood of two peaks (BWLA, arXiv 2605.00422).

Model. Each row of the rotated weight is a symmetric mixture of two Gaussians with equal weights,
1/2 N(c, v) + 1/2 N(-c, v). Equal weights and mirrored centers keep the two components balanced by construction, which
is what the paper's balance regularizer asks for.

Objective. The mean negative log likelihood per weight, with every row in units of its own root mean square (a constant
shift of the objective that makes it comparable across rows and layers).

Algorithm. With t = E[sign of the component | w] = tanh(c w / v), the negative log likelihood is majorized by
sum_i 1/(2 v_i) ||w_i - c_i t_i||^2 + const. Every step minimizes that majorizer exactly over one part of the unknowns,
so the objective is non-increasing: the mixture by soft EM in closed form, each Kronecker factor by a weighted
orthogonal Procrustes problem with the target (c_i / v_i) t_i.

Bounds. v is kept within [VARIANCE_FLOOR, VARIANCE_CEILING] times the row's mean square, where the closed form is
clamped and the objective still does not increase. The floor keeps a component from collapsing onto its points. The
ceiling keeps the components from merging: without it, the likelihood of a nearly Gaussian row is best at c -> 0, where
nothing pulls the weights towards two values any more and the rotation stops changing.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from bwla_converter.common.tensors import in_one_buffer
from bwla_converter.quantize.okt.cells import mean_of_rows, rows_mean
from torch import Tensor

VARIANCE_FLOOR = 1e-3
"""Lower bound of a component's variance v, in units of the row's mean square."""

VARIANCE_CEILING = 0.3
"""Upper bound of a component's variance v, in the same units; 1 leaves the likelihood unconstrained."""


@dataclass(frozen=True)
class Mixture:
    """Two mirrored Gaussians per row, for N rows: 1/2 N(center, variance) + 1/2 N(-center, variance).

    Attributes:
        center: c, float32 [N], non-negative.
        variance: v, float32 [N], positive.
    """

    center: Tensor
    variance: Tensor

    @property
    def slope(self) -> Tensor:
        """Return c / v in a shape that broadcasts over cells [P, N, Q]."""
        return (self.center / self.variance).unsqueeze(-1)


@dataclass(frozen=True)
class MixtureObjective:
    """The mean negative log likelihood per weight over the nonzero rows, in nats; an `Objective` of `rotation`.

    Attributes:
        mixtures: one per chunk of rows.
        ceiling: upper bound of the component variance, in units of the row's mean square; 1 for no bound.
        name: see `Objective`.
        first_relaxation: see `Objective`.
    """

    name: ClassVar[str] = "okt"
    first_relaxation: ClassVar[float] = 64.0

    mixtures: tuple[Mixture, ...]
    ceiling: float

    @classmethod
    def start(cls, chunks: Sequence[Tensor], ceiling: float = VARIANCE_CEILING) -> "MixtureObjective":
        """Return the objective with the mixtures of `start_mixture`."""
        parts = (start_mixture(chunk.flatten(0, 1), ceiling) for chunk in chunks)
        rows = (chunk[0, 0, :, 0] for chunk in chunks)
        return cls(mixtures_in_one_buffer(parts, rows), ceiling)

    def fitted(self, chunks: Sequence[Tensor]) -> tuple["MixtureObjective", float]:
        """Return the objective after one EM step for `chunks`, and its value before that step."""
        pairs = zip(chunks, self.mixtures, strict=True)
        steps = [em_step(chunk.flatten(0, 1), mixture, self.ceiling) for chunk, mixture in pairs]
        nonzero = [mixture.center > 0 for mixture in self.mixtures]
        mixtures = mixtures_in_one_buffer((mixture for mixture, _ in steps), nonzero)
        return MixtureObjective(mixtures, self.ceiling), mean_of_rows([rows for _, rows in steps], nonzero)

    def targets(self, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the Procrustes target of each chunk [G, n1, rows, n2], float32 in its shape."""
        for chunk, mixture in zip(chunks, self.mixtures, strict=True):
            yield procrustes_target(chunk, mixture)


def start_mixture(cells: Tensor, ceiling: float = VARIANCE_CEILING) -> Mixture:
    """Initialize the mixture from the hard assignment, c = mean|w|, because c = 0 is a stationary point of EM.

    Args:
        cells: rows of mean square at most 1, float32 [P, N, Q]; row i is cells[:, i].
        ceiling: upper bound of the variance.
    """
    center = rows_mean(cells.abs())
    return _bounded(center, rows_mean(cells.square()), ceiling)


def em_step(cells: Tensor, mixture: Mixture, ceiling: float = VARIANCE_CEILING) -> tuple[Mixture, Tensor]:
    """Perform one step of soft EM: c = mean(t w), v = mean(w^2) - c^2 within the bounds.

    The same pass over the cells gives the likelihood of the mixture that it starts from: with s = sigmoid(2 |a|) and
    a = c w / v, |t| = 2 s - 1 and ln cosh(a) = |a| - ln s - ln 2, which avoids overflow and cancellation.

    Args:
        cells: float32 [P, N, Q]; row i is cells[:, i].
        mixture: the mixture to start from.
        ceiling: upper bound of the variance.

    Returns: the updated mixture, and the mean negative log likelihood per weight of each row under `mixture`,
        float64 [N].
    """
    c, v = mixture.center.double(), mixture.variance.double()
    magnitudes = cells.abs()
    mean_magnitude, mean_square = rows_mean(magnitudes), rows_mean(cells.square())
    s = (magnitudes * (2.0 * mixture.slope)).sigmoid_()
    logcosh = c / v * mean_magnitude - rows_mean(s.log()) - math.log(2.0)
    likelihood = 0.5 * torch.log(2.0 * math.pi * v) + (mean_square + c * c) / (2.0 * v) - logcosh
    center = 2.0 * rows_mean(s.mul_(magnitudes)) - mean_magnitude
    return _bounded(center, mean_square, ceiling), likelihood


def procrustes_target(cells: Tensor, mixture: Mixture) -> Tensor:
    """Return the Procrustes target times its row weight, (c / v) t, float32 in the shape of `cells`.

    tanh(a) is computed as 2 sigmoid(2 a) - 1, which is five times as fast on a CPU and has the same absolute accuracy.
    """
    slope = mixture.slope
    return (cells * (2.0 * slope)).sigmoid_().mul_(2.0 * slope).sub_(slope)


def mixtures_in_one_buffer(mixtures: Iterable[Mixture], rows: Iterable[Tensor]) -> tuple[Mixture, ...]:
    """Copy `mixtures` into one buffer, see `in_one_buffer`; it has one entry per row of the tensors in `rows`."""
    tensors = list(rows)
    buffer = tensors[0].new_empty(2 * sum(map(len, tensors)), dtype=torch.float32)
    pairs = (torch.stack((mixture.center, mixture.variance)) for mixture in mixtures)
    return tuple(Mixture(*pair) for pair in in_one_buffer(pairs, buffer))


def _bounded(center: Tensor, mean_square: Tensor, ceiling: float) -> Mixture:
    # The best center does not depend on v, and the majorizer is unimodal in v, so clamping is exact.
    variance = (mean_square - center.square()).clamp(VARIANCE_FLOOR, ceiling)
    return Mixture(center.float(), variance.float())
