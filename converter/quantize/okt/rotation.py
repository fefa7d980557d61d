"""Learn a Kronecker rotation: alternating Procrustes steps, over-relaxed (OKT, BWLA, arXiv 2605.00422).

Algorithm. What the rotated rows are to minimize is an `Objective`: the likelihood of two peaks for one plane
(`mixture`, the publication's), the tails for several (`moment`). Each is bounded from above, near the present rows, by
a function whose minimizer over one Kronecker factor is the solution of an orthogonal Procrustes problem, which an SVD
gives. A round takes such a step for the left factor, one for the right factor, and fits the objective's own unknowns.

Over-relaxation. The bounds are much more curved than the objectives, so that their minimizers are short steps: the
likelihood still grows after 160 rounds. A longer step in the same direction multiplies the rotation's distance
from the identity by a factor, as in Salakhutdinov and Roweis, "Adaptive overrelaxed bound optimization methods"
(ICML 2003). The factor starts at the objective's `first_relaxation`. A round that would increase the objective is left
out, and halves the factor, down to 1.

Choices. On 8 input groups of SmolLM2-135M-Instruct (`python -m benchmarks.quality.okt`), 20 rounds of each objective
leave less error, in the planes that it is for, than 40 plain ones with two peaks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from bwla_converter.common.tensors import (
    count_not_finite,
    in_one_buffer,
    row_rms,
    sample_rows,
    split_rows,
    sum_in_double,
)
from bwla_converter.quantize.okt.mixture import MixtureObjective
from bwla_converter.quantize.okt.moment import MomentObjective
from bwla_kernels.errors import SourceError
from bwla_kernels.format.layer import ROTATION_DTYPE
from bwla_kernels.reference import rotate
from torch import Tensor

WEIGHTS_PER_PARAMETER = 512
"""Weights, for each entry of a rotation's factors, from which the rotation is learned; more hardly improve it."""

Start = Literal["random", "identity"]

StartObjective = Callable[[Sequence[Tensor]], "Objective"]
"""Returns the objective for the chunks of rows that learning starts with."""


class Objective(Protocol):
    """What the rotated rows minimize, with unknowns of its own where it has any; see `mixture` and `moment`.

    Chunks of rows are those of `State`.
    """

    @property
    def name(self) -> str:
        """The name of its values in a conversion's traces."""

    @property
    def first_relaxation(self) -> float:
        """The factor of over-relaxation in the first round."""

    def fitted(self, chunks: Sequence[Tensor]) -> tuple["Objective", float]:
        """Return the objective with its unknowns fitted to the rows, and its value before that."""

    def targets(self, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the Procrustes target T of each chunk Z, float32 in its shape.

        The value does not increase with a rotation of all chunks that does not decrease the sum of <Z, T>, within the
        range in which the objective's bound holds.
        """


@dataclass(frozen=True)
class Rotation:
    """One orthogonal Kronecker rotation per rotation group, in the convention of `bwla_kernels.reference.rotate`.

    Attributes:
        left: float32 [G, n1, n1], rounded to the dtype in which rotations are stored.
        right: float32 [G, n2, n2], likewise.
        objective: name of the objective.
        trace: the objective's value at the start and after each round; non-increasing.
    """

    left: Tensor
    right: Tensor
    objective: str
    trace: list[float]


@dataclass(frozen=True)
class State:
    """State of the alternation.

    Attributes:
        chunks: the rotated rows in units of their root mean square, float32 [G, n1, rows, n2] each. In this layout
            both Procrustes sums are matrix products.
        objective: what the chunks minimize.
        left, right: the current rotation, float64 on the CPU, [G, n1, n1] and [G, n2, n2].
    """

    chunks: tuple[Tensor, ...]
    objective: Objective
    left: Tensor
    right: Tensor


def objective_for(planes: int) -> StartObjective:
    """Return what starts the objective for a weight in `planes` planes: the mixture for one, the moment for several."""
    return MixtureObjective.start if planes == 1 else MomentObjective.start


def learn_rotation(
    weights: Sequence[Tensor],
    sizes: tuple[int, int, int],
    *,
    objective: StartObjective = MixtureObjective.start,
    rounds: int = 40,
    generator: torch.Generator,
    start: Start = "random",
    relaxation: float | None = None,
    on_round: Callable[[int, float], None] | None = None,
) -> Rotation:
    """Learn the rotation that the linears of one input group share.

    Of a group with more than WEIGHTS_PER_PARAMETER weights for each entry of the factors, evenly spaced rows are used.
    Holds three float32 copies of these rows in addition to the weights, and temporary buffers for a chunk of them.

    Args:
        weights: the group's weights [N_i, K], any float dtype, all on one device.
        sizes: (G, n1, n2) with G * n1 * n2 = K.
        objective: starts what is minimized, see `objective_for`.
        rounds: number of alternations of left factor, right factor and the objective's own unknowns.
        generator: source of the random initialization; unused if `start` is "identity".
        start: initial factors, "random" orthogonal or "identity".
        relaxation: factor of over-relaxation in the first round; 1 for plain steps, None for the objective's own.
        on_round: called with the round (0 for the start) and the value of the objective.

    Raises:
        SourceError: a weight does not have K columns, or a value is not finite.
    """
    state, value = fit_objective(start_state(weights, sizes, generator, objective, start))
    relaxation = state.objective.first_relaxation if relaxation is None else relaxation
    trace = [value]
    for number in range(rounds + 1):
        if number:
            after, value = fit_objective(right_step(left_step(state, relaxation), relaxation))
            if value <= trace[-1]:
                state = after
            else:
                relaxation = max(1.0, relaxation / 2)
            del after  # A round that is left out would hold another copy of the rows during the next one.
            trace.append(min(value, trace[-1]))
        if on_round is not None:
            on_round(number, trace[-1])
    device = weights[0].device
    # Rounded as they are stored, so that whatever is fitted in the rotated basis compensates the rounding.
    left, right = (factor.to(ROTATION_DTYPE).float().to(device) for factor in (state.left, state.right))
    return Rotation(left, right, state.objective.name, trace)


def start_state(
    weights: Sequence[Tensor],
    sizes: tuple[int, int, int],
    generator: torch.Generator,
    objective: StartObjective = MixtureObjective.start,
    start: Start = "random",
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
    return State(chunks, objective(chunks), left, right)


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


def fit_objective(state: State) -> tuple[State, float]:
    """Fit the objective's own unknowns with the rotation fixed; return its value before that as well."""
    objective, value = state.objective.fitted(state.chunks)
    return replace(state, objective=objective), value


def left_step(state: State, relaxation: float = 1.0) -> State:
    """Update the left factor by Procrustes: the D that maximizes the sum of <D^T Z, T> over chunks Z and targets T."""
    products = (z.flatten(2) @ target.flatten(2).mT for z, target in _targets(state))
    rotation = _procrustes(products, relaxation)
    factor = rotation.mT.to(state.chunks[0])
    chunks = in_one_buffer(((factor @ z.flatten(2)).view_as(z) for z in state.chunks), _buffer(state))
    return replace(state, chunks=chunks, left=state.left @ rotation)


def right_step(state: State, relaxation: float = 1.0) -> State:
    """Update the right factor by Procrustes: the D that maximizes the sum of <Z D, T> over chunks Z and targets T."""
    products = (z.flatten(1, 2).mT @ target.flatten(1, 2) for z, target in _targets(state))
    rotation = _procrustes(products, relaxation)
    factor = rotation.to(state.chunks[0])
    chunks = in_one_buffer(((z.flatten(1, 2) @ factor).view_as(z) for z in state.chunks), _buffer(state))
    return replace(state, chunks=chunks, right=state.right @ rotation)


def _targets(state: State) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of rows with their Procrustes targets."""
    return zip(state.chunks, state.objective.targets(state.chunks), strict=True)


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
