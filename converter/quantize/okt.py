"""OKT: a Kronecker rotation that makes the rows of a weight bimodal (BWLA, arXiv 2605.00422).

Model. Each row of the rotated weight is a symmetric mixture of two Gaussians with equal weights,
1/2 N(c, v) + 1/2 N(-c, v). Equal weights and mirrored centers keep the two components balanced by construction, which
is what the paper's balance regularizer asks for.

Objective. The mean negative log likelihood per weight, with every row in units of its own root mean square (a constant
shift of the objective that makes it comparable across rows and layers).

Algorithm. With t = E[sign of the component | w] = tanh(c w / v), the negative log likelihood is majorized by
sum_i 1/(2 v_i) ||w_i - c_i t_i||^2 + const. Every step minimizes that majorizer exactly over one part of the unknowns,
so the objective is non-increasing: the mixture by soft EM in closed form, each Kronecker factor by a weighted
orthogonal Procrustes problem, which an SVD solves.

Over-relaxation. The majorizer is much more curved than the objective, so that its minimizers are short steps: the
objective still falls after 160 rounds. A longer step in the same direction multiplies the rotation's distance
from the identity by a factor, as in Salakhutdinov and Roweis, "Adaptive overrelaxed bound optimization methods"
(ICML 2003). The factor starts at FIRST_RELAXATION. A round that would increase the objective is left out, and halves
the factor; at 1 a round is that of plain EM, which never increases it.

Bounds. v is kept within [VARIANCE_FLOOR, VARIANCE_CEILING] times the row's mean square, where the closed form is
clamped and the objective still does not increase. The floor keeps a component from collapsing onto its points. The
ceiling keeps the components from merging: without it, the likelihood of a nearly Gaussian row is best at c -> 0, where
nothing pulls the weights towards two values any more and the rotation stops changing.

Several planes have levels for the peaks' flanks, and gain more from short tails than from a gap between the peaks:
their ceiling is higher.

Choices. On 8 input groups of SmolLM2-135M-Instruct (`python -m benchmarks.quality.okt`), 20 rounds with these constants
leave less error than 40 plain ones with a ceiling of 0.15, the more so the more planes there are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from bwla_converter.common.tensors import (
    count_not_finite,
    in_one_buffer,
    row_rms,
    sample_rows,
    split_rows,
    sum_in_double,
)
from bwla_kernels.errors import SourceError
from bwla_kernels.format.layer import ROTATION_DTYPE
from bwla_kernels.reference import rotate
from torch import Tensor

VARIANCE_FLOOR = 1e-3
"""Lower bound of a component's variance v, in units of the row's mean square."""

VARIANCE_CEILING = 0.3
"""Upper bound of a component's variance v, in the same units; 1 leaves the likelihood unconstrained."""

PLANES_VARIANCE_CEILING = 0.6
"""The same for a weight in several planes."""

FIRST_RELAXATION = 64.0
"""Factor of over-relaxation in the first round."""

WEIGHTS_PER_PARAMETER = 512
"""Weights, for each entry of a rotation's factors, from which the rotation is learned; more hardly improve it."""

Start = Literal["random", "identity"]


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
class Rotation:
    """One orthogonal Kronecker rotation per rotation group, in the convention of `bwla_kernels.reference.rotate`.

    Attributes:
        left: float32 [G, n1, n1], rounded to the dtype in which rotations are stored.
        right: float32 [G, n2, n2], likewise.
        trace: objective at the start and after each round, in nats per weight; non-increasing.
    """

    left: Tensor
    right: Tensor
    trace: list[float]


@dataclass(frozen=True)
class State:
    """State of the alternation.

    Attributes:
        chunks: the rotated rows in units of their root mean square, float32 [G, n1, rows, n2] each. In this layout
            both Procrustes sums are matrix products.
        mixtures: one per chunk.
        left, right: the current rotation, float64 on the CPU, [G, n1, n1] and [G, n2, n2].
        ceiling: upper bound of the component variance.
    """

    chunks: tuple[Tensor, ...]
    mixtures: tuple[Mixture, ...]
    left: Tensor
    right: Tensor
    ceiling: float


def ceiling_for(planes: int) -> float:
    """Return the upper bound of the variance with which the rotation of a weight in `planes` planes is learned."""
    return VARIANCE_CEILING if planes == 1 else PLANES_VARIANCE_CEILING


def rows_mean(cells: Tensor) -> Tensor:
    """Return the mean of cells [P, N, Q] over all axes but the row axis, float64 [N]."""
    return cells.sum(-1).double().sum(0) / (cells.shape[0] * cells.shape[2])


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


def _bounded(center: Tensor, mean_square: Tensor, ceiling: float) -> Mixture:
    # The best center does not depend on v, and the majorizer is unimodal in v, so clamping is exact.
    variance = (mean_square - center.square()).clamp(VARIANCE_FLOOR, ceiling)
    return Mixture(center.float(), variance.float())


def learn_rotation(
    weights: Sequence[Tensor],
    sizes: tuple[int, int, int],
    *,
    rounds: int = 40,
    generator: torch.Generator,
    start: Start = "random",
    ceiling: float = VARIANCE_CEILING,
    relaxation: float = FIRST_RELAXATION,
    on_round: Callable[[int, float], None] | None = None,
) -> Rotation:
    """Learn the rotation that the linears of one input group share.

    Of a group with more than WEIGHTS_PER_PARAMETER weights for each entry of the factors, evenly spaced rows are used.
    Holds three float32 copies of these rows in addition to the weights.

    Args:
        weights: the group's weights [N_i, K], any float dtype, all on one device.
        sizes: (G, n1, n2) with G * n1 * n2 = K.
        rounds: number of alternations of mixture, left factor and right factor.
        generator: source of the random initialization; unused if `start` is "identity".
        start: initial factors, "random" orthogonal or "identity".
        ceiling: upper bound of the component variance, in units of the row's mean square; 1 for no bound.
        relaxation: factor of over-relaxation in the first round; 1 for plain EM.
        on_round: called with the round (0 for the start) and the objective.

    Raises:
        SourceError: a weight does not have K columns, or a value is not finite.
    """
    state, objective = mixture_step(start_state(weights, sizes, generator, start, ceiling))
    trace = [objective]
    for number in range(rounds + 1):
        if number:
            after, objective = mixture_step(right_step(left_step(state, relaxation), relaxation))
            if objective <= trace[-1]:
                state = after
            else:
                relaxation = max(1.0, relaxation / 2)
            trace.append(min(objective, trace[-1]))
        if on_round is not None:
            on_round(number, trace[-1])
    device = weights[0].device
    # Rounded as they are stored, so that whatever is fitted in the rotated basis compensates the rounding.
    left, right = (factor.to(ROTATION_DTYPE).float().to(device) for factor in (state.left, state.right))
    return Rotation(left, right, trace)


def start_state(
    weights: Sequence[Tensor],
    sizes: tuple[int, int, int],
    generator: torch.Generator,
    start: Start = "random",
    ceiling: float = VARIANCE_CEILING,
) -> State:
    """Check, normalize and rotate the rows; arguments and errors as in `learn_rotation`."""
    groups, n1, n2 = sizes
    width = groups * n1 * n2
    if not weights:
        raise SourceError("input group: expected at least one weight, found none")
    for index, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[1] != width:
            raise SourceError(
                f"weight {index} of the input group: expected shape [N, {width}] for the rotation {sizes}, "
                f"found {tuple(weight.shape)}: choose another factorization or exclude the layer with --ignore"
            )
        if count_not_finite(weight):
            raise SourceError(
                f"weight {index} of the input group: expected finite values, found NaN or infinity"
            )
    if start == "random":
        left, right = random_orthogonal(groups, n1, generator), random_orthogonal(groups, n2, generator)
    else:
        left, right = (torch.eye(n, dtype=torch.float64).repeat(groups, 1, 1) for n in (n1, n2))

    limit = WEIGHTS_PER_PARAMETER * groups * (n1 * n1 + n2 * n2)
    share = min(1.0, limit / sum(map(Tensor.numel, weights)))
    weights = [sample_rows(weight, math.ceil(share * weight.numel())) for weight in weights]

    def unit_cells() -> Iterator[Tensor]:
        for weight in weights:
            factors = (left.float().to(weight.device), right.float().to(weight.device))
            for rows in split_rows(weight):
                unit = rows / row_rms(rows).unsqueeze(1)
                yield rotate(unit.float(), *factors).view(-1, groups, n1, n2).permute(1, 2, 0, 3)

    chunks = in_one_buffer(
        unit_cells(), weights[0].new_empty(sum(map(Tensor.numel, weights)), dtype=torch.float32)
    )
    mixtures = mixtures_in_one_buffer(
        (start_mixture(chunk.flatten(0, 1), ceiling) for chunk in chunks), weights
    )
    return State(chunks, mixtures, left, right, ceiling)


def mixtures_in_one_buffer(mixtures: Iterable[Mixture], rows: Iterable[Tensor]) -> tuple[Mixture, ...]:
    """Copy `mixtures` into one buffer, see `in_one_buffer`; it has one entry per row of the tensors in `rows`."""
    tensors = list(rows)
    buffer = tensors[0].new_empty(2 * sum(map(len, tensors)), dtype=torch.float32)
    pairs = (torch.stack((mixture.center, mixture.variance)) for mixture in mixtures)
    return tuple(Mixture(*pair) for pair in in_one_buffer(pairs, buffer))


def random_orthogonal(count: int, order: int, generator: torch.Generator) -> Tensor:
    """Draw `count` orthogonal matrices from the Haar distribution, float64 on the CPU [count, order, order]."""
    noise = torch.randn(
        count, order, order, generator=generator, device=generator.device, dtype=torch.float64
    )
    q, r = torch.linalg.qr(noise.cpu())
    # QR is unique up to signs; those of the diagonal of R make Q uniform (Mezzadri, arXiv math-ph/0609050).
    diagonal = torch.diagonal(r, dim1=-2, dim2=-1)
    uniform: Tensor = q * torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2)
    return uniform


def mixture_step(state: State) -> tuple[State, float]:
    """Update the mixture by one EM step, with the rotation fixed.

    Returns: the updated state, and the objective before the update: the mean negative log likelihood per weight over
        the nonzero rows; 0 if there are none.
    """
    pairs = zip(state.chunks, state.mixtures, strict=True)
    steps = [em_step(chunk.flatten(0, 1), mixture, state.ceiling) for chunk, mixture in pairs]
    nonzero = [mixture.center > 0 for mixture in state.mixtures]
    mixtures = mixtures_in_one_buffer((mixture for mixture, _ in steps), nonzero)
    return replace(state, mixtures=mixtures), mean_of_rows([rows for _, rows in steps], nonzero)


def mean_of_rows(values: Sequence[Tensor], selected: Sequence[Tensor]) -> float:
    """Return the mean of the selected values; 0 if none is.

    Args:
        values: float64 [N_i] each.
        selected: bool [N_i] each.
    """
    total = sum(float(rows[mask].sum()) for rows, mask in zip(values, selected, strict=True))
    return total / max(sum(int(mask.sum()) for mask in selected), 1)


def left_step(state: State, relaxation: float = 1.0) -> State:
    """Update the left factor by weighted Procrustes: the D that maximizes sum_i <D^T Z_i, (c_i/v_i) t_i>."""
    products = (z.flatten(2) @ target.flatten(2).mT for z, target in _targets(state))
    rotation = _procrustes(products, relaxation)
    factor = rotation.mT.to(state.chunks[0])
    chunks = in_one_buffer(((factor @ z.flatten(2)).view_as(z) for z in state.chunks), _buffer(state))
    return replace(state, chunks=chunks, left=state.left @ rotation)


def right_step(state: State, relaxation: float = 1.0) -> State:
    """Update the right factor by weighted Procrustes: the D that maximizes sum_i <Z_i D, (c_i/v_i) t_i>."""
    products = (z.flatten(1, 2).mT @ target.flatten(1, 2) for z, target in _targets(state))
    rotation = _procrustes(products, relaxation)
    factor = rotation.to(state.chunks[0])
    chunks = in_one_buffer(((z.flatten(1, 2) @ factor).view_as(z) for z in state.chunks), _buffer(state))
    return replace(state, chunks=chunks, right=state.right @ rotation)


def _targets(state: State) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of rows with their Procrustes targets."""
    for chunk, mixture in zip(state.chunks, state.mixtures, strict=True):
        yield chunk, procrustes_target(chunk, mixture)


def _buffer(state: State) -> Tensor:
    """Return an uninitialized buffer for all chunks."""
    return state.chunks[0].new_empty(sum(map(Tensor.numel, state.chunks)))


def _procrustes(products: Iterable[Tensor], relaxation: float) -> Tensor:
    """Return the over-relaxed polar factors of the sum of `products` [G, n, n], float64 on the CPU."""
    return _relaxed(_polar(sum_in_double(products).cpu()), relaxation)


def _polar(matrices: Tensor) -> Tensor:
    """Return the orthogonal polar factors of matrices [G, n, n]."""
    u, _, vh = torch.linalg.svd(matrices)
    polar: Tensor = u @ vh
    return polar


def _relaxed(rotation: Tensor, relaxation: float) -> Tensor:
    """Return the orthogonal matrices nearest to I + r (R - I), for orthogonal R [G, n, n] and r = `relaxation` >= 1.

    No singular value of that sum is below 1, so that the nearest matrix is well defined.
    """
    if relaxation == 1.0:
        return rotation
    return _polar(torch.lerp(torch.eye(rotation.shape[-1]).to(rotation), rotation, relaxation))
