"""Choose the number of planes of each input group, for a size or for a loss.

Planes are added one at a time, always where the predicted loss falls most per stored bit. As each plane of a group
gains less than the one before, this greedy choice is optimal but for the last few planes (Shoham and Gersho, 1988).
"""

import heapq
from collections.abc import Iterator, Sequence

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
    levels = _levels(groups)
    chosen = [of_group[0] for of_group in levels]
    free = target * weights - sum(group.bits for group in chosen)
    if free < 0:
        raise BWLAError(
            f"--bits {target:g}: expected at least {bits_of(chosen):.3f}, which one plane in every input group needs "
            "with its scales and rotations, found less: choose more --bits"
        )
    for number, added in _additions(levels, free):
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
    levels = _levels(groups)
    chosen = [of_group[0] for of_group in levels]
    additions = _additions(levels, float("inf"))
    while predicted_loss(chosen, activation_bits) > target:
        step = next(additions, None)
        if step is None:
            raise BWLAError(
                f"--loss {target:g}: expected at least {predicted_loss(chosen, activation_bits):.3g} nats per token, "
                f"which {MAX_PLANES} planes in every input group are predicted to lose with {activation_bits}-bit "
                "activations: choose a larger --loss, or more --abits"
            )
        number, added = step
        chosen[number] = added
    return chosen


def _levels(groups: Sequence[GroupCost]) -> list[list[GroupCost]]:
    """Return every group with 1 to MAX_PLANES planes."""
    return [[group.with_planes(planes) for planes in range(1, MAX_PLANES + 1)] for group in groups]


def _additions(levels: Sequence[Sequence[GroupCost]], free: float) -> Iterator[tuple[int, GroupCost]]:
    """Yield the number of a group and the group with another plane, always where it gains the most per bit.

    Args:
        levels: every group with each number of planes; at first, all have the first.
        free: stored bits that may be added in all. A plane that no longer fits is left out.
    """
    bits = [[group.bits for group in of_group] for of_group in levels]
    heap: list[tuple[float, int, int]] = []

    def offer(number: int, level: int) -> None:
        """Put the step of a group from the level before to `level` on the heap, unless it gains nothing."""
        if level < len(levels[number]):
            before, after = levels[number][level - 1 : level + 1]
            gain = (before.loss - after.loss) / (bits[number][level] - bits[number][level - 1])
            if gain > 0:
                heapq.heappush(heap, (-gain, number, level))

    for number in range(len(levels)):
        offer(number, 1)
    while heap:
        _, number, level = heapq.heappop(heap)
        added = bits[number][level] - bits[number][level - 1]
        if added <= free:
            free -= added
            yield number, levels[number][level]
            offer(number, level + 1)
