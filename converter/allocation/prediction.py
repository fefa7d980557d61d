"""Predict the loss of a model from the sensitivities of its input groups, their planes, and the activation bits."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bwla_converter.allocation.sensitivity import Sensitivity
from bwla_converter.common.bits import total_bits
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS

ROUNDING_ERROR = {1: 0.29, 2: 0.115, 3: 0.027, 4: 0.0075}
"""Variance of a weight's rounding error by the number of planes, in units of the row's mean square.

The least possible for a Gaussian are 0.363, 0.118, 0.035 and 0.0095 (Max, 1960). These are fitted to the losses of
SmolLM2-135M-Instruct at 1.16, 2.2, 3.2 and 4.2 bits per weight (docs/benchmarks/quality.md). They are smaller because
rotated rows have shorter tails, and because of coordinate descent and the low-rank correction."""

ABSMAX = 3.2
"""Largest magnitude of a token's rotated inputs in units of their root mean square, typical of 500 to 5,000 columns."""

ACTIVATION_SHARE = 0.05
"""Share of the predicted loss that activation codes may add before 8 bits are recommended."""

RECOMMENDED_BITS = 8


@dataclass(frozen=True)
class GroupCost:
    """An input group in the allocation.

    Attributes:
        specs: specs of its linears, by name.
        sensitivity: how much the loss depends on it.
    """

    specs: dict[str, LayerSpec]
    sensitivity: Sensitivity

    @property
    def planes(self) -> int:
        """The number of planes of its linears."""
        return next(iter(self.specs.values())).planes

    @property
    def bits(self) -> int:
        """The stored bits of its linears, everything counted."""
        return total_bits(self.specs)

    @property
    def loss(self) -> float:
        """The predicted loss of quantizing its weights, in nats per token."""
        return self.sensitivity.weights * ROUNDING_ERROR[self.planes]

    def with_planes(self, planes: int, rank: int | None = None) -> "GroupCost":
        """Return the group with another number of planes and, unless it is None, another rank."""
        specs = {
            name: replace(spec, planes=planes, rank=spec.rank if rank is None else rank)
            for name, spec in self.specs.items()
        }
        return replace(self, specs=specs)


def activation_loss(groups: Iterable[GroupCost], bits: int) -> float:
    """Return the predicted loss of quantizing the inputs of all groups to `bits` bits, in nats per token.

    The codes of a token and rotation group are uniform, so the variance of their error is step^2 / 12.
    """
    if bits == UNQUANTIZED_BITS:
        return 0.0
    step = ABSMAX / ((1 << (bits - 1)) - 1)
    return step**2 / 12 * sum(group.sensitivity.inputs for group in groups)


def predicted_loss(groups: Iterable[GroupCost], bits: int) -> float:
    """Return the predicted increase of the loss in nats per token.

    Args:
        groups: all input groups.
        bits: activation bits.
    """
    listed = list(groups)
    return sum(group.loss for group in listed) + activation_loss(listed, bits)


def recommended_bits(groups: Iterable[GroupCost], bits: int) -> int:
    """Return `bits`, or 8 where activation codes of fewer bits add more than ACTIVATION_SHARE to the loss."""
    listed = list(groups)
    costly = activation_loss(listed, bits) > ACTIVATION_SHARE * sum(group.loss for group in listed)
    return RECOMMENDED_BITS if costly and bits < RECOMMENDED_BITS else bits
