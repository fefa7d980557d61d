"""PSP: the low-rank part whose removal makes a rotated weight more two-peaked (BWLA, arXiv 2605.00422).

Model. W - M, with M of rank r, follows the two-peaked mixture of `okt`, row by row. Objective: the mean
negative log likelihood per weight of W - M, rows in units of the root mean square of W's rows.

Steps, alternated: the mixture by soft EM with M fixed; then M with the mixture fixed. The majorizer of
`okt`, sum_i 1/(2 v_i) ||w_i - m_i - c_i t_i||^2, is in the row-whitened coordinates D M, D = diag(v^(-1/2)),
half the squared distance to D (W - c t). A gradient step of unit length lands on that point from anywhere,
and truncating it to rank r is the proximal map of the rank constraint: together the exact minimiser.

Truncation. Randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061), started from the
previous round's subspace. Left whitening does not move M's row space, and neither an iteration of a positive
semidefinite map nor Rayleigh-Ritz lets the captured power fall, so the objective cannot grow even where the
truncation is not yet exact. Only the row space is shared by an input group: M = B A, A on the input side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from bwla_converter.common.tensors import count_not_finite, in_one_buffer, row_rms, split_rows, sum_in_double
from bwla_converter.quantize.okt import (
    VARIANCE_CEILING,
    Mixture,
    fit_mixture,
    mixtures_in_one_buffer,
    negative_log_likelihood,
    procrustes_target,
    start_mixture,
)
from bwla_kernels.errors import SourceError
from torch import Tensor

OVERSAMPLE = 8
"""Directions iterated beyond the rank, which make the wanted ones converge faster."""

POWER_ITERATIONS = 2
"""Subspace iterations a round; they add up over the rounds, because each starts where the last one ended."""


@dataclass(frozen=True)
class LowRank:
    """M = b a in the rotated basis.

    Attributes:
        b: float32 [N, r].
        a: float32 [r, K], orthonormal rows.
        trace: the objective at M = 0 and after each round, in nats per weight; never grows.
    """

    b: Tensor
    a: Tensor
    trace: list[float]


@dataclass(frozen=True)
class State:
    """Where the alternation stands.

    Attributes:
        weight: the rotated rows [N, K], as given.
        rms: root mean square of its rows, float32 [N, 1]; 1 for zero rows.
        b: float32 [N, r], in units of `rms`.
        basis: orthonormal columns, float32 [K, q]; the first r span M's row space.
        mixtures: one for each chunk of rows.
        ceiling: bound of the components' variance.
    """

    weight: Tensor
    rms: Tensor
    b: Tensor
    basis: Tensor
    mixtures: tuple[Mixture, ...]
    ceiling: float

    @property
    def a(self) -> Tensor:
        """The rows that M is made of, float32 [r, K]."""
        return self.basis[:, : self.b.shape[1]].mT


def proximal_low_rank(
    rotated: Tensor,
    rank: int,
    *,
    rounds: int = 20,
    generator: torch.Generator,
    ceiling: float = VARIANCE_CEILING,
    on_round: Callable[[int, float], None] | None = None,
) -> LowRank:
    """Find the low-rank part of a rotated input group.

    Holds one float32 copy of `rotated` beside it.

    Args:
        rotated: the group's rotated rows, pooled, [N, K]; float32, or else copied to it.
        rank: r; 0 gives empty factors and an empty trace.
        rounds: rounds of mixture and low-rank part.
        generator: source of the first subspace.
        ceiling: bound of the components' variance in units of the mean square of W's row; 1 for none.
        on_round: called with the round's number (0 is the start) and the objective.

    Raises:
        SourceError: the rank exceeds N or K, or `rotated` is not a matrix of finite values.
    """
    if rank == 0:
        rows, columns = rotated.shape
        b, a = (rotated.new_zeros(shape, dtype=torch.float32) for shape in ((rows, 0), (0, columns)))
        return LowRank(b, a, [])
    state = start_state(rotated, rank, generator, ceiling)
    trace = [objective(state)]
    for number in range(rounds + 1):
        if number:
            state = low_rank_step(mixture_step(state))
            trace.append(objective(state))
        if on_round is not None:
            on_round(number, trace[-1])
    return LowRank(state.b * state.rms, state.a.contiguous(), trace)


def start_state(
    rotated: Tensor, rank: int, generator: torch.Generator, ceiling: float = VARIANCE_CEILING
) -> State:
    """Check the input and start from M = 0; arguments and errors as in `proximal_low_rank`."""
    if rotated.dim() != 2 or not 0 < rank <= min(rotated.shape):
        raise SourceError(
            f"the low-rank part: expected a rank of at most min(N, K) of the group's weights, found rank {rank} "
            f"for {tuple(rotated.shape)}: choose a smaller rank"
        )
    if count_not_finite(rotated):
        raise SourceError("the low-rank part: expected finite weights, found NaN or infinity")
    rotated = rotated.float()
    rows, columns = rotated.shape
    width = min(rank + OVERSAMPLE, rows, columns)
    noise = torch.randn(columns, width, generator=generator, device=generator.device, dtype=torch.float64)
    basis = torch.linalg.qr(noise.to(rotated.device))[0].float()
    rms = rotated.new_empty(rows)
    in_one_buffer((row_rms(part) for part in split_rows(rotated)), rms)
    rms = rms.clamp_min(torch.finfo(torch.float32).tiny)  # what underflows to 0 here is no row of zeros
    state = State(rotated, rms.unsqueeze(1), rotated.new_zeros(rows, rank), basis, (), ceiling)
    mixtures = (start_mixture(rest.unsqueeze(0), ceiling) for _, rest in _parts(state))
    return replace(state, mixtures=mixtures_in_one_buffer(mixtures, [rotated]))


def _parts(state: State) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (W, W - M), in units of W's row rms."""
    sizes = [len(part) for part in split_rows(state.weight)]
    columns = (part.split(sizes) for part in (state.weight, state.rms, state.b))
    for weight, rms, b in zip(*columns, strict=True):
        unit = weight / rms
        yield unit, unit - b @ state.a


def objective(state: State) -> float:
    """Mean negative log likelihood per weight of W - M, over the rows that are not zero; 0 where all are."""
    total, count = 0.0, 0
    for (unit, rest), mixture in zip(_parts(state), state.mixtures, strict=True):
        alive = (unit != 0).any(1)
        total += float(negative_log_likelihood(rest.unsqueeze(0), mixture)[alive].sum())
        count += int(alive.sum())
    return total / max(count, 1)


def mixture_step(state: State) -> State:
    """The mixture of W - M by one step of EM, M fixed."""
    pairs = zip(_parts(state), state.mixtures, strict=True)
    fitted = (fit_mixture(rest.unsqueeze(0), mixture, state.ceiling) for (_, rest), mixture in pairs)
    return replace(state, mixtures=mixtures_in_one_buffer(fitted, [state.weight]))


def low_rank_step(state: State) -> State:
    """M by a whitened proximal step, the mixture fixed."""
    rank = state.b.shape[1]
    roots = [mixture.variance.sqrt().unsqueeze(1) for mixture in state.mixtures]

    def whitened() -> Iterator[Tensor]:
        for (unit, rest), mixture, root in zip(_parts(state), state.mixtures, roots, strict=True):
            # D (W - c t) = v^(-1/2) W - v^(1/2) (c / v) t
            yield unit / root - procrustes_target(rest.unsqueeze(0), mixture).squeeze(0) * root

    points = in_one_buffer(whitened(), state.weight.new_empty(state.weight.numel()))
    basis = dominant_rows(points, state.basis, POWER_ITERATIONS)
    b = torch.cat([root * (point @ basis[:, :rank]) for point, root in zip(points, roots, strict=True)])
    return replace(state, basis=basis, b=b)


def dominant_rows(chunks: Sequence[Tensor], basis: Tensor, iterations: int) -> Tensor:
    """Turn `basis` towards the leading right singular vectors of a matrix given in chunks of rows.

    Args:
        chunks: float32 [N_i, K] each.
        basis: start, orthonormal columns [K, q].
        iterations: subspace iterations.

    Returns: orthonormal columns float32 [K, q], by falling singular value (Rayleigh-Ritz). The power that
        the first r columns capture is at least what the first r columns of the start captured.
    """
    for _ in range(iterations):
        image = sum_in_double(chunk.mT @ (chunk @ basis) for chunk in chunks)
        basis = torch.linalg.qr(image)[0].float()
    gram = sum_in_double(_gram(chunk @ basis) for chunk in chunks)
    turn = torch.linalg.eigh(gram)[1].flip(-1)
    ordered: Tensor = torch.linalg.qr(basis.double() @ turn)[0].float()
    return ordered


def _gram(x: Tensor) -> Tensor:
    return x.double().mT @ x.double()
