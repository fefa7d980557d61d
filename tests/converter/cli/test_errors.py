"""Errors of the commands become one message and an exit code."""

import io

import pytest
import torch
import typer
from bwla_converter.cli.errors import errors_reported
from bwla_kernels.errors import BWLAError
from rich.console import Console


def report(error: BaseException, **settings: object) -> tuple[str, int]:
    """Raise an error; return what is printed, and the exit code."""
    stream = io.StringIO()
    with pytest.raises(typer.Exit) as exit_, errors_reported(Console(file=stream), **settings):
        raise error
    return stream.getvalue(), exit_.value.exit_code


def torch_out_of_memory() -> RuntimeError:
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError("2**62 bytes were allocated")


def test_what_a_user_can_mend_is_one_message() -> None:
    assert report(BWLAError("model [x]: expected a folder")) == ("error: model [x]: expected a folder\n", 1)


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (OSError("no space left"), "error: no space left; out was not written"),
        (MemoryError(), "error: out of memory (): free some memory, or use a larger machine; out was not"),
        (torch_out_of_memory(), "error: out of memory ("),
    ],
)
def test_an_error_in_the_middle_says_what_is_left(error: Exception, start: str) -> None:
    output, code = report(error, consequence=lambda: "out was not written")
    assert output.startswith(start)
    assert output.endswith("; out was not written\n")
    assert code == 1


def test_an_interrupt_has_the_exit_code_of_its_signal() -> None:
    assert report(KeyboardInterrupt()) == ("interrupted\n", 130)
    settings = {"consequence": lambda: "add --resume", "interrupt_code": lambda: 143}
    assert report(KeyboardInterrupt(), **settings) == ("interrupted: add --resume\n", 143)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("a bug"), typer.Exit(7)])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, errors_reported(Console(file=io.StringIO())):
        raise error
    assert raised.value is error
