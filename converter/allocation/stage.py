"""The allocation as a step of the conversion: from the options and the sensitivities to the final plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bwla_converter.allocation.allocate import allocate_for_bits, allocate_for_loss, bits_of
from bwla_converter.allocation.prediction import GroupCost, predicted_loss, recommended_bits
from bwla_converter.allocation.sensitivity import Sensitivity
from bwla_converter.common.bits import auto_rank, largest_fitting_rank
from bwla_converter.options import Options
from bwla_converter.planning.plan import ConversionPlan, with_planes
from bwla_converter.source.structure import NATS
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.layer import MAX_PLANES
from bwla_kernels.format.schema import Provenance

MIN_BITS, MAX_BITS = 1.1, 4.5
"""Range of `--bits`."""

DIAL = (1.16, 1.5, 2.2, 2.7, 3.2, 4.2)
"""Bits per weight whose predicted losses every conversion reports."""


@dataclass(frozen=True)
class Allocation:
    """The result of the allocation.

    Attributes:
        plan: the final plan.
        predicted_loss: its predicted increase of the loss, in the unit of the loss.
        predicted_losses: bits per weight -> what `--bits` of that many is predicted to lose.
        recommended_bits: activation bits that keep the share of activations in the loss small; the plan's or more.
        loss_unit: unit of the loss, see `Structure.loss_unit`.
    """

    plan: ConversionPlan
    predicted_loss: float
    predicted_losses: Mapping[float, float]
    recommended_bits: int
    loss_unit: str = NATS


def check_targets(options: Options) -> None:
    """Check that the options of the allocation fit together, before any work.

    Raises:
        BWLAError: they do not.
    """
    if not options.allocates:
        return
    given = [
        flag
        for flag, chosen in (
            ("--bits", options.target_bits is not None),
            ("--loss", options.target_loss is not None),
            ("--planes", options.planes != 1),
        )
        if chosen
    ]
    if len(given) > 1:
        raise BWLAError(
            f"expected one of --bits, --loss and --planes, found {' and '.join(given)}: give one of them"
        )
    if options.calibration is None:
        raise BWLAError(
            f"{given[0]}: expected calibration text, on which sensitivities are measured, found recipe "
            f"{options.recipe}, which uses none: choose --recipe fast"
        )
    if options.target_bits is not None and not MIN_BITS <= options.target_bits <= MAX_BITS:
        raise BWLAError(
            f"--bits: expected {MIN_BITS} to {MAX_BITS} bits per weight, everything counted, found "
            f"{options.target_bits:g}"
        )
    if options.target_loss is not None and not options.target_loss > 0:
        raise BWLAError(f"--loss: expected nats per token above 0, found {options.target_loss:g}")


def allocate(
    plan: ConversionPlan,
    groups: Iterable[Sequence[str]],
    options: Options,
    sensitivities: Mapping[str, Sensitivity],
) -> Allocation:
    """Choose the planes of every input group, and predict the loss.

    Args:
        plan: the plan so far.
        groups: names of the linears of every input group.
        options: the options; without a target, the plan keeps its planes.
        sensitivities: from `sensitivity.measure_sensitivities`.

    Raises:
        BWLAError: the target cannot be reached.
    """
    rank = plan.rank if options.rank is not None or not options.allocates else 0
    bits = plan.format.bits
    planned = with_planes(plan, {name: spec.planes for name, spec in plan.specs.items()}, rank, bits)
    costs = [
        GroupCost({name: planned.specs[name] for name in names}, sensitivities[names[0]])
        for names in groups
        if names[0] in sensitivities
    ]
    dial = predicted_losses(costs, bits)
    chosen = costs
    if options.target_bits is not None:
        chosen = allocate_for_bits(costs, options.target_bits)
    elif options.target_loss is not None:
        chosen = allocate_for_loss(costs, options.target_loss, bits if options.bits is not None else 8)
        if options.bits is None:
            bits = recommended_bits(chosen, bits)
            chosen = allocate_for_loss(costs, options.target_loss, bits)
    if options.allocates:
        planes = {name: spec.planes for cost in chosen for name, spec in cost.specs.items()}
        if options.target_bits is not None and options.rank is None and set(planes.values()) == {MAX_PLANES}:
            specs = {name: spec for cost in chosen for name, spec in cost.specs.items()}
            rank = auto_rank(largest_fitting_rank(specs, options.target_bits))
        plan = with_planes(plan, planes, rank, bits)
    return Allocation(plan, predicted_loss(chosen, bits), dial, recommended_bits(chosen, bits))


def target_option(provenance: Provenance) -> list[str]:
    """Return the words of the option that the planes were chosen for, `--bits 2.2` or `--loss 0.1`; none without."""
    return [word for name, value in provenance.allocation.items() for word in (f"--{name}", f"{value:g}")]


def predicted_losses(costs: Sequence[GroupCost], bits: int) -> dict[float, float]:
    """Return the predicted losses at the bits per weight of DIAL, as far as one plane in every group allows."""
    plain = [cost.with_planes(1, rank=0) for cost in costs]
    targets = (target for target in DIAL if target >= bits_of(plain))
    return {target: predicted_loss(allocate_for_bits(plain, target), bits) for target in targets}
