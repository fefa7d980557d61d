"""Errors that end a start of vLLM."""

from collections.abc import Iterator
from contextlib import contextmanager

from bwla_kernels.errors import BWLAError


class StartError(RuntimeError):
    """This model cannot be served as asked; the message is one sentence, meant for the user.

    Not a ValueError: vLLM builds its configuration inside pydantic, which buries a ValueError's message in
    the middle of a validation report, while any other exception stays the last line of the output.
    """


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn a BWLAError raised inside into a `StartError` with the same message and no chain."""
    try:
        yield
    except BWLAError as error:
        raise StartError(str(error)) from None
