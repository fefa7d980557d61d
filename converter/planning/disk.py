"""Sizes of the output's files, and the disk space that a conversion needs while it writes them.

Each decoder layer is written into a part of its own, so that an interrupted conversion can be resumed. At the end the
parts are merged into files of the usual size, each of which exists beside its parts until these are removed.
"""

from bwla_converter.common.tensors import entry_bytes
from bwla_converter.planning.plan import ConversionPlan
from bwla_converter.source.model import Source

MAX_FILE_BYTES = 5 * 10**9
"""Maximum size of a file of the output, as in transformers; a larger tensor gets its own."""

PART_BYTES = 4 * 2**30
"""Maximum size of a part with tensors outside the decoder layers; a larger tensor gets its own."""


def merging_bytes(output: float, largest: float) -> float:
    """Return the disk space for merging the parts: the largest file that exists twice.

    Args:
        output: size of the output.
        largest: size of its largest part.
    """
    return min(output, max(MAX_FILE_BYTES, largest))


def replaced_bytes(source: Source, plan: ConversionPlan, whole_model: bool) -> float:
    """Return the disk space for the parts that a recipe writes again at its end.

    Args:
        source, plan: the model, and the plan of its conversion.
        whole_model: whether these are all parts, or only the one with the final norm.
    """
    if whole_model:
        return float(plan.output_bytes(source))
    outside = [entry_bytes(source.entries[name]) for name in source.names_outside_layers()]
    return float(min(sum(outside), max([PART_BYTES, *outside])))
