"""Errors that stop vLLM during startup."""

from collections.abc import Iterator
from contextlib import contextmanager

from bwla_kernels.errors import BWLAError


class StartError(RuntimeError):
    """The model cannot be served as requested; the message is one sentence, meant for the user.

    Not a ValueError: vLLM builds its configuration inside pydantic, which moves the message of a ValueError to the
    middle of a validation report, while that of any other exception is the last line of the output.
    """


@contextmanager
def one_sentence() -> Iterator[None]:
    """Convert a BWLAError raised inside the context into a `StartError` with the same message and no cause."""
    try:
        yield
    except BWLAError as error:
        raise StartError(str(error)) from None
