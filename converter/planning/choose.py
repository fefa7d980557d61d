"""Choose the recipe where it is left to us, and plan the conversion that the options ask for."""

import math
from dataclasses import replace
from importlib.metadata import version

from bwla_converter.options import AUTO_RECIPE, SELF, Options
from bwla_converter.planning.lossless import LosslessWeights, find_lossless, not_lossless, plan_lossless
from bwla_converter.planning.plan import ConversionPlan, make_plan
from bwla_converter.source.model import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.layer import MAX_PLANES
from bwla_kernels.format.schema import Provenance

PLANES_UNKNOWN = 3
"""Planes that cost is predicted for where `--loss` decides, which is not known before the sensitivities are."""


def choose_recipe(options: Options, source: Source) -> tuple[Options, LosslessWeights | None]:
    """Return the options with the recipe, and for recipe `lossless` how the weights are stored.

    `auto` is `lossless` where the weights have one bit or three values already and no option asks for others.

    Raises:
        BWLAError: recipe `lossless` cannot store the model, or not with these options.
    """
    if options.recipe not in (AUTO_RECIPE, "lossless"):
        return options, None
    asked = _asks_for_other_weights(options)
    if options.recipe == "lossless" and asked:
        raise BWLAError(f"recipe 'lossless' stores the weights as they are, found {asked}: leave it out")
    weights = None if asked else find_lossless(source)
    if weights is not None:
        return replace(options, recipe="lossless", calibration=None), weights
    if options.recipe == "lossless":
        raise not_lossless(source)
    return replace(options, recipe="fast"), None


def _asks_for_other_weights(options: Options) -> str | None:
    """Return an option that only makes sense for weights that are still to be quantized; None if there is none."""
    calibration = options.calibration
    given = {
        "--planes": options.planes != 1,
        "--bits": options.target_bits is not None,
        "--loss": options.target_loss is not None,
        "--rank": options.rank is not None,
        "--clip": options.clip is not None,
        "--calibration": calibration is not None and calibration.source != SELF,
    }
    return next((flag for flag, is_given in given.items() if is_given), None)


def plan_conversion(
    options: Options, source: Source, weights: LosslessWeights | None = None
) -> ConversionPlan:
    """Plan a conversion.

    Args:
        options: its options.
        source: the checked model.
        weights: from `choose_recipe`.

    Raises:
        BWLAError: as `make_plan` and `plan_lossless`.
    """
    targets = {"bits": options.target_bits, "loss": options.target_loss}
    provenance = Provenance(
        base_model=source.name,
        revision=source.revision,
        recipe=options.recipe,
        seed=options.seed,
        bwla_version=version("bwla"),
        calibration={},
        allocation={key: value for key, value in targets.items() if value is not None},
    )
    if weights is not None:
        return plan_lossless(
            source, weights, options.bits, provenance, options.head_bits, options.embedding_bits
        )
    rank, planes = options.rank, options.planes
    if options.allocates:
        # Until the planes of each group are known, memory and time are predicted for as many in all of them.
        rank, planes = rank or 0, min(math.ceil(options.target_bits or PLANES_UNKNOWN), MAX_PLANES)
    return make_plan(
        source,
        rank,
        options.bits,
        options.clip,
        provenance,
        options.head_bits,
        planes,
        options.embedding_bits,
    )
