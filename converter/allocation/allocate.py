"""Choose the number of planes of each input group, for a size or for a loss.

Planes are added one at a time, always where the predicted loss falls most per stored bit. As each plane of a group
gains less than the one before, this greedy choice is optimal but for the last few planes (Shoham and Gersho, 1988).
"""

from collections.abc import Sequence

from bwla_converter.allocation.prediction import GroupCost, predicted_loss
from bwla_converter.common.bits import num_weights
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.layer import MAX_PLANES


def bits_of(groups: Sequence[GroupCost]) -> float:
    """Return the stored bits per weight of all groups together."""
    weights = sum(num_weights(spec) for group in groups for spec in group.specs.values())
    return sum(group.bits for group in groups) / weights


def allocate_for_bits(groups: Sequence[GroupCost], target: float) -> list[GroupCost]:
    """Return the groups with as many planes as `target` stored bits per weight allow, everything counted.

    Raises:
        BWLAError: one plane in every group needs more than `target`.
    """
    weights = sum(num_weights(spec) for group in groups for spec in group.specs.values())
    chosen = [group.with_planes(1) for group in groups]
    free = target * weights - sum(group.bits for group in chosen)
    if free < 0:
        raise BWLAError(
            f"--bits {target:g}: expected at least {bits_of(chosen):.3f}, which one plane in every input group needs "
            "with its scales and rotations, found less: choose more --bits"
        )
    while (number := _next_plane(chosen, free)) is not None:
        added = chosen[number].with_planes(chosen[number].planes + 1)
        free -= added.bits - chosen[number].bits
        chosen[number] = added
    return chosen


def allocate_for_loss(groups: Sequence[GroupCost], target: float, activation_bits: int) -> list[GroupCost]:
    """Return the groups with as few planes as a predicted loss of at most `target` nats per token needs.

    Args:
        groups: all input groups.
        target: the loss.
        activation_bits: bits of the activations.

    Raises:
        BWLAError: four planes in every group are predicted to lose more than `target`.
    """
    chosen = [group.with_planes(1) for group in groups]
    while predicted_loss(chosen, activation_bits) > target:
        number = _next_plane(chosen, float("inf"))
        if number is None:
            raise BWLAError(
                f"--loss {target:g}: expected at least {predicted_loss(chosen, activation_bits):.3g} nats per token, "
                f"which {MAX_PLANES} planes in every input group are predicted to lose with {activation_bits}-bit "
                "activations: choose a larger --loss, or more --abits"
            )
        chosen[number] = chosen[number].with_planes(chosen[number].planes + 1)
    return chosen


def _next_plane(groups: Sequence[GroupCost], free: float) -> int | None:
    """Return the group in which another plane of at most `free` bits gains the most per bit; None if none fits."""
    best, best_gain = None, 0.0
    for number, group in enumerate(groups):
        if group.planes < MAX_PLANES:
            added = group.with_planes(group.planes + 1)
            bits = added.bits - group.bits
            gain = (group.loss - added.loss) / bits
            if bits <= free and gain > best_gain:
                best, best_gain = number, gain
    return best
