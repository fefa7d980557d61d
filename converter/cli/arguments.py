"""Building blocks of the command lines: options in panels, parsers of their values, and options shared by commands.

A command with many options takes one frozen dataclass for each panel of its `--help` instead of a parameter for each
option. The fields of such a dataclass are annotated as typer expects it of parameters.
"""

import inspect
import re
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, fields
from inspect import Parameter
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer
from typer.models import OptionInfo

PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME", help="Upload the checkpoint to this repository on the Hugging Face Hub."
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="Create that repository as a private one if it is new.")
]


class Panel:
    """Base class of the panels.

    Subclasses are frozen dataclasses. Each field is annotated with `Annotated[type, typer.Option(...)]`, or
    `typer.Argument(...)`, and has a name that no other panel of the same command uses.
    """

    title: ClassVar[str]


def with_panels(command: Callable[..., None]) -> Callable[..., None]:
    """Return a function that typer can make a command of, with the fields of all panels as parameters.

    Args:
        command: takes panels, each annotated with a subclass of `Panel`, and ordinary parameters.
    """
    hints = get_type_hints(command, include_extras=True)
    panels = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Panel)
    }
    parameters: list[Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in panels:
            parameters += _parameters_of(panels[name])
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))

    def run(**values: Any) -> None:
        groups = {
            name: panel(**{field.name: values.pop(field.name) for field in _fields(panel)})
            for name, panel in panels.items()
        }
        command(**groups, **values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    # typer reads the parameters from these two.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _fields(panel: Any) -> Any:
    return fields(panel)


def _parameters_of(panel: type[Panel]) -> list[Parameter]:
    hints = get_type_hints(panel, include_extras=True)
    parameters = []
    for field in _fields(panel):
        kind, info = get_args(hints[field.name])
        if isinstance(info, OptionInfo):
            info = copy(info)
            info.rich_help_panel = panel.title
        default = Parameter.empty if field.default is MISSING else field.default
        annotation = Annotated[kind, info]  # type: ignore[valid-type]
        parameters.append(
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters


def parse_rank(text: str) -> int | None:
    """Parse a rank: "auto", which is None, or a number.

    Raises:
        typer.BadParameter: `text` is something else.
    """
    if text == "auto":
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"expected auto or a number like 16, found {text!r}")
    return int(text)


def parse_clip(text: str) -> float | None:
    """Parse a clipping ratio: "auto", which is None, or a number.

    Raises:
        typer.BadParameter: `text` is something else.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise typer.BadParameter(f"expected auto or a number like 0.9, found {text!r}") from None


def parse_device(text: str) -> str:
    """Check the name of a device.

    Raises:
        typer.BadParameter: `text` names none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise typer.BadParameter(f"expected auto, cpu, cuda or one GPU like cuda:1, found {text!r}")
    return text


def parse_size(text: str) -> int:
    """Parse a size like 12GB, 800MiB or 4096 into bytes.

    Raises:
        typer.BadParameter: `text` is something else.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"expected a size like 12GB or 800MiB, found {text!r}") from None
