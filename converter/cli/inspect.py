"""`bwla-inspect`: show what a checkpoint contains, check that it is intact, and export it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from bwla_converter.cli.arguments import Panel, Private, PushToHub, with_panels
from bwla_converter.cli.errors import errors_reported
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from bwla_converter.checkpoint.contents import Contents
    from bwla_converter.checkpoint.integrity import Verdict

EXAMPLES = """
Examples:

  bwla-inspect ./qwen3-8b-bwla

  bwla-inspect ./qwen3-8b-bwla --layers

  bwla-inspect ./qwen3-8b-bwla --dequantize ./qwen3-8b-dense

  bwla-inspect ./qwen3-8b-bwla --evaluation result.json --push-to-hub me/qwen3-8b-bwla
"""

WIDTH = 110
"""Minimum width of the tables: a narrower terminal wraps the lines instead of cutting off numbers."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@dataclass(frozen=True)
class Display(Panel):
    """What is shown and checked."""

    title = "What is shown and checked"

    layers: Annotated[
        bool, typer.Option("--layers", help="Show a row for every linear layer instead of one for each kind.")
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False
    no_hashes: Annotated[
        bool, typer.Option("--no-hashes", help="Do not read the files to compare their hashes.")
    ] = False


@dataclass(frozen=True)
class Dequantization(Panel):
    """The dequantized model."""

    title = "Dequantized model"

    dequantize: Annotated[
        Path | None,
        typer.Option(
            help="Write a model with dequantized weights to this folder. Its activations are not quantized.",
        ),
    ] = None
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Data type of its weights.")
    ] = "bfloat16"
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of --dequantize if it is a model already.")
    ] = False


@dataclass(frozen=True)
class Publishing(Panel):
    """The model card and the upload."""

    title = "Publishing"

    evaluation: Annotated[
        Path | None,
        typer.Option(help="Add the results of this file, written by bwla-eval --out, to the model card."),
    ] = None
    push_to_hub: PushToHub = None
    private: Private = False


@app.command(epilog=EXAMPLES)
@with_panels
def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder that bwla-convert wrote.", metavar="CHECKPOINT")
    ],
    display: Display,
    dequantization: Dequantization,
    publishing: Publishing,
) -> None:
    """Inspect a BWLA checkpoint. The exit code is 1 if it is incomplete or was changed after it was written."""
    console = Console(stderr=True)
    with errors_reported(console):
        _show_checked(checkpoint, display)
        if dequantization.dequantize is not None:
            _dequantize(console, checkpoint, dequantization.dequantize, dequantization)
        if publishing.evaluation is not None:
            from bwla_converter.report.model_card import add_evaluation

            add_evaluation(checkpoint, publishing.evaluation)
        if publishing.push_to_hub is not None:
            from bwla_converter.checkpoint.hub import push

            url = push(checkpoint, publishing.push_to_hub, publishing.private or None)
            console.print(f"pushed to {url}", soft_wrap=True)


def _show_checked(checkpoint: Path, display: Display) -> None:
    """Print the contents and the state of a checkpoint.

    Raises:
        typer.Exit: its files are not as they were written.
    """
    from bwla_converter.checkpoint.contents import read_contents
    from bwla_converter.checkpoint.integrity import check_hashes

    contents = read_contents(checkpoint)
    verdict = None if display.no_hashes else check_hashes(checkpoint)
    if display.as_json:
        typer.echo(json.dumps(facts(contents, verdict, not display.no_hashes), indent=1))
    else:
        console = Console(width=max(Console().width, WIDTH))
        show(console, contents, verdict, not display.no_hashes, display.layers)
    if verdict is not None and not verdict.intact:
        raise typer.Exit(1)


def _dequantize(console: Console, checkpoint: Path, folder: Path, settings: Dequantization) -> None:
    from bwla_converter.checkpoint.dequantize import write_dequantized

    with console.status("dequantizing") as status:
        done = write_dequantized(
            checkpoint,
            folder,
            settings.dtype,
            settings.overwrite,
            lambda name: status.update(f"dequantizing {name}"),
        )
    console.print(
        f"{escape(str(folder))}: {done.linears} linears dequantized, {done.bytes:,} bytes in {settings.dtype}; "
        "activations are not quantized, so the outputs are those of --abits 16",
        soft_wrap=True,
        highlight=False,
    )


def facts(contents: "Contents", verdict: "Verdict | None", hashed: bool) -> dict[str, Any]:
    """Return everything that is shown, as plain data.

    Args:
        contents: the contents of the checkpoint.
        verdict: the result of comparing the hashes; None if they were not compared or are not stored.
        hashed: whether they were to be compared.
    """
    from bwla_converter.checkpoint.contents import layer_row

    return {
        "format": contents.format.to_json(),
        "bits_per_weight": contents.bits_per_weight,
        "bits": dict(contents.bits),
        "quantized_weights": contents.weights,
        "bytes": dict(contents.bytes),
        "files": {
            path.name: path.stat().st_size for path in sorted(contents.folder.iterdir()) if path.is_file()
        },
        "layers": [layer_row(name, spec) for name, spec in contents.all_specs.items()],
        "integrity": {"stored": verdict is not None, "intact": verdict.intact, **asdict(verdict)}
        if verdict is not None
        else {"stored": None if not hashed else False},
    }


def show(
    console: Console, contents: "Contents", verdict: "Verdict | None", hashed: bool, every: bool
) -> None:
    """Print the contents as tables; `every` shows a row for every linear instead of one for each kind."""
    from bwla_converter.checkpoint.contents import describe_vocabulary_bits

    data = facts(contents, verdict, hashed)
    provenance = contents.format.provenance
    console.print(_layer_table(data["layers"], every))
    console.print(_size_table(data))
    origin = {
        "base model": provenance.base_model + (f" at {provenance.revision}" if provenance.revision else ""),
        "recipe": f"{contents.recipe}, seed {provenance.seed}",
        "calibration": ", ".join(f"{key} {value}" for key, value in provenance.calibration.items()) or "none",
        "activations": "not quantized" if contents.format.bits == 16 else f"{contents.format.bits} bits",
        "head": describe_vocabulary_bits(contents.head_bits),
        "embedding": describe_vocabulary_bits(contents.embedding_bits),
        "made with": f"bwla {provenance.bwla_version}",
    }
    for key, value in origin.items():
        console.print(f"{key:<12} {escape(value)}", highlight=False, soft_wrap=True)
    if verdict is None:
        reason = "no bwla_hashes.json, so the hashes cannot be compared" if hashed else "not checked"
        console.print(f"{'integrity':<12} {reason}", highlight=False, soft_wrap=True)
    else:
        colour = "green" if verdict.intact else "bold red"
        console.print(
            f"{'integrity':<12} [{colour}]{escape(str(verdict))}[/]", highlight=False, soft_wrap=True
        )


def _layer_table(rows: list[dict[str, Any]], every: bool) -> Table:
    from bwla_kernels.format.experts import kind_of

    table = Table(title="quantized linears")
    table.add_column("linear", no_wrap=True)
    for title in ("count", "N x K", "rotation", "planes", "rank", "bits / weight", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        name = row["name"] if every else kind_of(row["name"])
        key = (name, *row["shape"], *row["rotation"], row["planes"], row["rank"])
        kinds.setdefault(key, []).append(row)
    for (name, n, k, rotation_groups, n1, n2, planes, rank), members in kinds.items():
        table.add_row(
            name,
            str(len(members)),
            f"{n} x {k}",
            f"{rotation_groups} x ({n1} x {n2})",
            str(planes),
            str(rank),
            f"{8 * sum(row['bytes'] for row in members) / (len(members) * n * k):.3f}",
            f"{sum(row['bytes'] for row in members):,}",
        )
    return table


def _size_table(data: dict[str, Any]) -> Table:
    table = Table(title=f"{data['bits_per_weight']:.4f} bits per quantized weight")
    for title in ("what", "bits / weight", "bytes"):
        table.add_column(title, justify="left" if title == "what" else "right")
    for part, bits in data["bits"].items():
        table.add_row(f"  {part}", f"{bits:.4f}", f"{round(bits * data['quantized_weights'] / 8):,}")
    for part, size in data["bytes"].items():
        table.add_row(part, "", f"{size:,}")
    table.add_row("all tensors", "", f"{sum(data['bytes'].values()):,}")
    table.add_row("all files", "", f"{sum(data['files'].values()):,}")
    return table


def main() -> None:
    """Entry point of `bwla-inspect`."""
    app()
