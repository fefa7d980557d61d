"""Panels of options, and the parsers of their values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from bwla_converter.cli.arguments import Panel, parse_clip, parse_device, parse_rank, parse_size, with_panels
from typer.testing import CliRunner


@dataclass(frozen=True)
class Fruit(Panel):
    title = "Fruit"

    name: Annotated[str, typer.Argument(help="A fruit.")]
    count: Annotated[int, typer.Option("--number", help="How many.", min=1)] = 3


@dataclass(frozen=True)
class Basket(Panel):
    title = "Basket"

    colours: Annotated[list[str] | None, typer.Option("--colour")] = None


def invoke(*arguments: str):
    app = typer.Typer(rich_markup_mode="rich")

    @app.command()
    @with_panels
    def buy(fruit: Fruit, basket: Basket, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        """Buy fruit."""
        typer.echo(f"{fruit} {basket} {loud}")

    return CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})


def test_fields_of_panels_are_options_of_the_command() -> None:
    done = invoke("pear", "--number", "5", "--colour", "red", "--colour", "blue", "--loud")
    expected = f"{Fruit('pear', 5)} {Basket(['red', 'blue'])} True"
    assert done.output.strip() == expected


def test_defaults_come_from_the_panels() -> None:
    assert invoke("pear").output.strip() == f"{Fruit('pear')} {Basket()} False"


def test_constraints_of_a_field_hold() -> None:
    done = invoke("pear", "--number", "0")
    assert done.exit_code == 2
    assert "--number" in done.output


def test_help_shows_every_panel_under_its_title() -> None:
    output = invoke("--help").output
    assert "Buy fruit." in output
    assert output.index(" Fruit ─") < output.index("--number") < output.index(" Basket ─")


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_rank, "auto", None),
        (parse_rank, "16", 16),
        (parse_clip, "auto", None),
        (parse_clip, "0.9", 0.9),
        (parse_device, "cuda:1", "cuda:1"),
        (parse_size, "12GB", 12 * 10**9),
        (parse_size, "800 MiB", 800 * 2**20),
        (parse_size, "1.5gb", 1.5e9),
        (parse_size, "4096", 4096),
    ],
)
def test_values(parse: Callable[[str], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "sentence"),
    [
        (parse_rank, "many", "expected auto or a number like 16, found 'many'"),
        (parse_clip, "half", "expected auto or a number like 0.9, found 'half'"),
        (parse_device, "tpu", "expected auto, cpu, cuda or one GPU like cuda:1, found 'tpu'"),
        (parse_size, "much", "expected a size like 12GB or 800MiB, found 'much'"),
        (parse_size, "12XB", "expected a size like 12GB or 800MiB, found '12XB'"),
        (parse_size, "", "expected a size like 12GB or 800MiB, found ''"),
    ],
)
def test_other_values(parse: Callable[[str], object], text: str, sentence: str) -> None:
    with pytest.raises(typer.BadParameter) as error:
        parse(text)
    assert error.value.message == sentence
