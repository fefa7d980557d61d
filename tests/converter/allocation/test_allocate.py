"""The allocation: sizes and losses are met, planes go where they gain the most, and what cannot be is refused."""

from dataclasses import replace

import pytest
from bwla_converter.allocation.allocate import allocate_for_bits, allocate_for_loss, bits_of
from bwla_converter.allocation.prediction import (
    ROUNDING_ERROR,
    GroupCost,
    activation_loss,
    predicted_loss,
    recommended_bits,
)
from bwla_converter.allocation.sensitivity import Sensitivity
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import LayerSpec

SPEC = LayerSpec(512, 256, 1, 16, 16)


def groups(*weights: float, inputs: float = 0.0) -> list[GroupCost]:
    return [
        GroupCost({f"linear{number}": SPEC}, Sensitivity(value, inputs))
        for number, value in enumerate(weights)
    ]


MANY = groups(*(1.1**number for number in range(100)), inputs=1.0)


@pytest.mark.parametrize("target", [1.16, 1.5, 2.0, 2.2, 2.5, 3.2, 4.0])
def test_the_size_asked_for_is_met(target: float) -> None:
    chosen = allocate_for_bits(MANY, target)
    assert 0.99 * target < bits_of(chosen) <= target


@pytest.mark.parametrize("share", [0.5, 0.1, 0.05])
def test_a_loss_is_met_with_no_plane_to_spare(share: float) -> None:
    target = share * predicted_loss(MANY, 16)
    chosen = allocate_for_loss(MANY, target, 16)
    assert 0.95 * target < predicted_loss(chosen, 16) <= target


def test_planes_go_to_the_sensitive_groups() -> None:
    first, second, third = (group.planes for group in allocate_for_bits(groups(1.0, 100.0, 1.0), 2.0))
    assert (first, third) == (1, 1)
    assert second > 1


def test_no_other_choice_of_the_same_size_loses_less() -> None:
    chosen = allocate_for_bits(groups(1.0, 2.0, 5.0, 11.0), 2.6)
    loss, total = predicted_loss(chosen, 16), sum(group.planes for group in chosen)
    numbers = range(1, 5)
    for counts in ((a, b, c, d) for a in numbers for b in numbers for c in numbers for d in numbers):
        if sum(counts) <= total:
            other = [group.with_planes(count) for group, count in zip(chosen, counts, strict=True)]
            assert predicted_loss(other, 16) >= loss - 1e-12


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(
        BWLAError, match=r"--bits 1: expected at least 1\.\d+, which one plane in every input group"
    ):
        allocate_for_bits(MANY, 1.0)
    with pytest.raises(BWLAError, match=r"--loss 1e-05: expected at least .* 4 planes in every input group"):
        allocate_for_loss(MANY, 1e-5, 6)


def test_the_loss_is_that_of_weights_and_activations() -> None:
    listed = groups(1.0, 2.0, inputs=3.0)
    assert predicted_loss(listed, 16) == pytest.approx(3 * ROUNDING_ERROR[1])
    assert activation_loss(listed, 8) == pytest.approx(activation_loss(listed, 6) * (31 / 127) ** 2)
    assert predicted_loss(listed, 6) == pytest.approx(predicted_loss(listed, 16) + activation_loss(listed, 6))


def test_more_activation_bits_are_recommended_where_they_matter() -> None:
    listed = groups(1.0, inputs=3.0)
    assert recommended_bits(listed, 6) == 6
    assert recommended_bits([group.with_planes(4) for group in listed], 6) == 8
    assert recommended_bits([group.with_planes(4) for group in listed], 16) == 16
    deaf = [replace(group, sensitivity=Sensitivity(1.0, 1000.0)) for group in listed]
    assert recommended_bits(deaf, 8) == 8
