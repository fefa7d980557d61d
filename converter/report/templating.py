"""The jinja2 environment of the report's page and of the model card."""

import functools
import math

from bwla_converter.common.durations import duration
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from rich.filesize import decimal

LARGEST_LOSS = math.log(1e6)
"""Loss from which the factor is of no interest."""


def factor(loss: float) -> str:
    """Format the factor by which a loss in nats per token multiplies the perplexity."""
    return f"{math.exp(loss):.3g}" if loss < LARGEST_LOSS else "over 1000000"


@functools.cache
def environment() -> Environment:
    """Return the environment with this package's templates; those of HTML escape what they are given."""
    templates = Environment(
        loader=PackageLoader("bwla_converter.report"),
        autoescape=select_autoescape(["html"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters.update(decimal=decimal, duration=duration, factor=factor)
    return templates
