"""PSP: a low-rank correction whose removal makes a rotated weight more bimodal (BWLA, arXiv 2605.00422).

Model. The rows of W - M, with M of rank r, follow the bimodal mixture of `okt.mixture`. The objective is the mean
negative log likelihood per weight of W - M, with each row in units of the root mean square of W's row.

Algorithm. Two steps alternate: fit the mixture by soft EM with M fixed, then update M with the mixture fixed. In the
row-whitened coordinates D M with D = diag(v^(-1/2)), the majorizer of `okt.mixture`,
sum_i 1/(2 v_i) ||w_i - m_i - c_i t_i||^2, is half the squared distance to D (W - c t). A gradient step of unit length
reaches that point from any M, and truncating it to rank r is the proximal map of the rank constraint. Together they are
the exact minimizer.

Truncation. Subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061), started from the previous round's subspace.
Left whitening does not change the row space of M, and neither an iteration with a positive semidefinite operator nor
Rayleigh-Ritz decreases the captured squared norm. The objective is therefore non-increasing even before the
truncation has converged. Only the row space is shared within an input group: M = B A, and A is part of the input
transform.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from bwla_converter.common.tensors import (
    OVERSAMPLING,
    count_not_finite,
    in_one_buffer,
    row_rms,
    split_rows,
    subspace_iteration,
    sum_in_double,
)
from bwla_converter.quantize.okt.cells import mean_of_rows
from bwla_converter.quantize.okt.mixture import (
    Mixture,
    em_step,
    mixtures_in_one_buffer,
    procrustes_target,
    start_mixture,
)
from bwla_kernels.errors import SourceError
from torch import Tensor

VARIANCE_CEILING = 0.15
"""Upper bound of a component's variance, in units of the row's mean square, see `okt.mixture`."""

SUBSPACE_ITERATIONS = 2
"""Subspace iterations per round. They add up over the rounds, because each round starts from the last subspace."""


@dataclass(frozen=True)
class LowRank:
    """Low-rank correction M = b a in the rotated basis.

    Attributes:
        b: float32 [N, r].
        a: float32 [r, K], orthonormal rows.
        trace: objective at M = 0 and after each round, in nats per weight; non-increasing.
    """

    b: Tensor
    a: Tensor
    trace: list[float]


@dataclass(frozen=True)
class State:
    """State of the alternation.

    Attributes:
        weight: rotated rows W, float32 [N, K].
        rms: root mean square of each row of W, float32 [N, 1]; 1 for rows of zeros.
        nonzero: whether a row of W has a value other than zero, bool [N].
        b: float32 [N, r], in units of `rms`.
        basis: orthonormal columns, float32 [K, q]; the first r span the row space of M.
        mixtures: one per chunk of rows.
        ceiling: upper bound of the component variance.
    """

    weight: Tensor
    rms: Tensor
    nonzero: Tensor
    b: Tensor
    basis: Tensor
    mixtures: tuple[Mixture, ...]
    ceiling: float

    @property
    def a(self) -> Tensor:
        """The factor A of M = B A, float32 [r, K]."""
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
    """Fit the low-rank correction of a rotated input group.

    Holds one float32 copy of `rotated` in addition to it.

    Args:
        rotated: concatenated rotated rows of the group, [N, K]; copied if not float32.
        rank: r; 0 returns empty factors and an empty trace.
        rounds: number of alternations.
        generator: source of the initial subspace.
        ceiling: upper bound of the component variance, in units of the row's mean square; 1 for no bound.
        on_round: called with the round (0 for the start) and the objective.

    Raises:
        SourceError: the rank exceeds N or K, or `rotated` is not a matrix of finite values.
    """
    if rank == 0:
        rows, columns = rotated.shape
        b, a = (rotated.new_zeros(shape, dtype=torch.float32) for shape in ((rows, 0), (0, columns)))
        return LowRank(b, a, [])
    state = start_state(rotated, rank, generator, ceiling)
    trace: list[float] = []
    for round_number in range(rounds + 1):
        if round_number:
            state = low_rank_step(state)
        state, objective = mixture_step(state)
        trace.append(objective)
        if on_round is not None:
            on_round(round_number, objective)
    return LowRank(state.b * state.rms, state.a.contiguous(), trace)


def start_state(
    rotated: Tensor, rank: int, generator: torch.Generator, ceiling: float = VARIANCE_CEILING
) -> State:
    """Check the input and initialize with M = 0; arguments and errors as in `proximal_low_rank`."""
    if rotated.dim() != 2 or not 0 < rank <= min(rotated.shape):
        raise SourceError(
            f"low-rank correction: expected a matrix and a rank from 1 to min(N, K), found shape "
            f"{tuple(rotated.shape)} and rank {rank}: choose a smaller rank"
        )
    if count_not_finite(rotated):
        raise SourceError("low-rank correction: expected finite weights, found NaN or infinity")
    rotated = rotated.float()
    rows, columns = rotated.shape
    width = min(rank + OVERSAMPLING, rows, columns)
    noise = torch.randn(columns, width, generator=generator, device=generator.device, dtype=torch.float64)
    basis = torch.linalg.qr(noise.to(rotated.device))[0].float()
    rms = rotated.new_empty(rows)
    in_one_buffer((row_rms(part) for part in split_rows(rotated)), rms)
    rms = rms.clamp_min(
        torch.finfo(torch.float32).tiny
    )  # an rms that underflows to 0 is not that of a row of zeros
    nonzero = torch.cat([(part != 0).any(1) for part in split_rows(rotated)])
    state = State(rotated, rms.unsqueeze(1), nonzero, rotated.new_zeros(rows, rank), basis, (), ceiling)
    mixtures = (start_mixture(rest.unsqueeze(0), ceiling) for *_, rest in _parts(state))
    return replace(state, mixtures=mixtures_in_one_buffer(mixtures, [rotated]))


def _parts(state: State) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield chunks of W, of its row rms, and of W - M in units of the row rms."""
    sizes = [len(part) for part in split_rows(state.weight)]
    columns = (part.split(sizes) for part in (state.weight, state.rms, state.b))
    for weight, rms, b in zip(*columns, strict=True):
        yield weight, rms, torch.addmm(weight, b * rms, state.a, alpha=-1.0).div_(rms)


def mixture_step(state: State) -> tuple[State, float]:
    """Update the mixture by one EM step on W - M, with M fixed.

    Returns: the updated state, and the objective before the update: the mean negative log likelihood per weight of
        W - M over the nonzero rows; 0 if there are none.
    """
    pairs = zip(_parts(state), state.mixtures, strict=True)
    steps = [em_step(rest.unsqueeze(0), mixture, state.ceiling) for (*_, rest), mixture in pairs]
    mixtures = mixtures_in_one_buffer((mixture for mixture, _ in steps), [state.weight])
    likelihoods = torch.cat([rows for _, rows in steps])
    return replace(state, mixtures=mixtures), mean_of_rows([likelihoods], [state.nonzero])


def low_rank_step(state: State) -> State:
    """Update M by a whitened proximal step, with the mixture fixed."""
    rank = state.b.shape[1]
    roots = [mixture.variance.sqrt().unsqueeze(1) for mixture in state.mixtures]

    def whitened_targets() -> Iterator[Tensor]:
        for (weight, rms, rest), mixture, root in zip(_parts(state), state.mixtures, roots, strict=True):
            # D (W - c t) = v^(-1/2) W - v^(1/2) (c / v) t
            pull = procrustes_target(rest.unsqueeze(0), mixture).squeeze(0)
            yield pull.mul_(-root).addcdiv_(weight, rms * root)

    targets = in_one_buffer(whitened_targets(), state.weight.new_empty(state.weight.numel()))
    basis = dominant_row_space(targets, state.basis, SUBSPACE_ITERATIONS)
    b = torch.cat([root * (target @ basis[:, :rank]) for target, root in zip(targets, roots, strict=True)])
    return replace(state, basis=basis, b=b)


def dominant_row_space(chunks: Sequence[Tensor], basis: Tensor, iterations: int) -> Tensor:
    """Approximate the leading right singular vectors of a matrix that is given in chunks of rows.

    Args:
        chunks: float32 [N_i, K] each.
        basis: initial subspace, orthonormal columns [K, q].
        iterations: number of subspace iterations.

    Returns: orthonormal columns, float32 [K, q], in order of decreasing singular value. The squared norm that the
        first r columns capture is at least what the first r columns of the initial basis capture.
    """
    return subspace_iteration(
        lambda x: sum_in_double(chunk.mT @ (chunk @ x) for chunk in chunks),
        lambda x: sum_in_double(_gram(chunk @ x) for chunk in chunks),
        basis,
        iterations,
    )


def _gram(x: Tensor) -> Tensor:
    """Return X^T X in float64."""
    return x.double().mT @ x.double()
