"""Errors of the commands: a sentence on stderr and an exit code instead of a traceback."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from bwla_kernels.errors import BWLAError
from rich.console import Console
from rich.markup import escape

INTERRUPTED = 128 + signal.SIGINT
"""Exit code that shells expect of a process which Ctrl-C has ended."""


@contextmanager
def errors_reported(
    console: Console,
    consequence: Callable[[], str] = lambda: "",
    interrupt_code: Callable[[], int] = lambda: INTERRUPTED,
) -> Iterator[None]:
    """Turn the errors that a user can do something about into a message and an exit code; let all others pass.

    Args:
        console: where the message is printed.
        consequence: says, after an error in the middle of the work, what has become of it and how to continue.
        interrupt_code: the exit code after Ctrl-C or SIGTERM.

    Raises:
        typer.Exit: after BWLAError, OSError and running out of memory with exit code 1, after KeyboardInterrupt with
            `interrupt_code`.
    """
    try:
        yield
    except typer.Exit:
        raise
    except BWLAError as error:
        raise _reported(console, str(error)) from None
    except KeyboardInterrupt:
        _print(console, ": ".join(filter(None, ["interrupted", consequence()])))
        raise typer.Exit(interrupt_code()) from None
    except OSError as error:
        raise _reported(console, str(error), consequence()) from None
    except (MemoryError, RuntimeError) as error:
        from bwla_converter.common.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        advice = f"out of memory ({reason}): free some memory, or use a larger machine"
        raise _reported(console, advice, consequence()) from None


def _reported(console: Console, *parts: str) -> typer.Exit:
    _print(console, f"[bold red]error:[/] {escape('; '.join(filter(None, parts)))}", markup=True)
    return typer.Exit(1)


def _print(console: Console, line: str, markup: bool = False) -> None:
    console.print(line, markup=markup, soft_wrap=True)
