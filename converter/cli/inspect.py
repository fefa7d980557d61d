"""`bwla-inspect`: what is in a checkpoint, whether it is intact, and ways out of it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from bwla_kernels.errors import BWLAError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from bwla_converter.checkpoint.contents import Contents
    from bwla_converter.checkpoint.integrity import Verdict

EXAMPLES = """
Examples:

  bwla-inspect ./qwen3-8b-bwla                               what is in it, and is it intact

  bwla-inspect ./qwen3-8b-bwla --layers

  bwla-inspect ./qwen3-8b-bwla --dequantize ./qwen3-8b-dense

  bwla-inspect ./qwen3-8b-bwla --evaluation result.json --push-to-hub me/qwen3-8b-bwla
"""

WIDTH = 110
"""Columns that the table of layers needs; a narrower terminal wraps it, which beats cutting numbers off."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that bwla-convert wrote.")],
    layers: Annotated[bool, typer.Option("--layers", help="A row for every layer, not one a kind.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    no_hashes: Annotated[
        bool, typer.Option("--no-hashes", help="Do not read the files through to compare their hashes.")
    ] = False,
    dequantize: Annotated[
        Path | None,
        typer.Option(
            help="Write a plain model with dense weights to this folder; it quantizes no activations."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of that model: bfloat16, float16 or float32.")] = "bfloat16",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of --dequantize if it is a model already.")
    ] = False,
    evaluation: Annotated[
        Path | None, typer.Option(help="Put the figures of this bwla-eval --out file into the model card.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the checkpoint to this repository, owner/name.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository a private one if it is new.")
    ] = False,
) -> None:
    """Look into a BWLA checkpoint. Exit status 1: it is not a complete one, or not as it was written."""
    from bwla_converter.checkpoint.contents import read_contents
    from bwla_converter.checkpoint.integrity import check_hashes

    console = Console(stderr=True)
    try:
        contents = read_contents(checkpoint)
        verdict = None if no_hashes else check_hashes(checkpoint)
        if as_json:
            typer.echo(json.dumps(facts(contents, verdict, not no_hashes), indent=1))
        else:
            show(Console(width=max(Console().width, WIDTH)), contents, verdict, not no_hashes, layers)
        if verdict is not None and not verdict.intact:
            raise typer.Exit(1)
        _ways_out(console, checkpoint, dequantize, dtype, overwrite, evaluation)
        if push_to_hub is not None:
            from bwla_converter.checkpoint.hub import push

            console.print(f"pushed to {push(checkpoint, push_to_hub, private or None)}", soft_wrap=True)
    except BWLAError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except OSError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def _ways_out(
    console: Console,
    checkpoint: Path,
    dequantize: Path | None,
    dtype: str,
    overwrite: bool,
    evaluation: Path | None,
) -> None:
    if dequantize is not None:
        from bwla_converter.checkpoint.dequantize import write_dequantized

        with console.status("making weights dense") as status:
            done = write_dequantized(
                checkpoint, dequantize, dtype, overwrite, lambda name: status.update(f"dense: {name}")
            )
        console.print(
            f"{escape(str(dequantize))}: {done.linears} linears made dense, {done.bytes:,} bytes in {dtype}; "
            "its activations are not quantized, so its outputs are those of --abits 16",
            soft_wrap=True,
            highlight=False,
        )
    if evaluation is not None:
        from bwla_converter.report.model_card import add_evaluation

        add_evaluation(checkpoint, evaluation)


def facts(contents: "Contents", verdict: "Verdict | None", hashed: bool) -> dict[str, Any]:
    """Everything that is shown, as plain data."""
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
        "layers": [layer_row(name, spec) for name, spec in contents.specs.items()],
        "integrity": {"stored": verdict is not None, "intact": verdict.intact, **asdict(verdict)}
        if verdict is not None
        else {"stored": None if not hashed else False},
    }


def show(
    console: Console, contents: "Contents", verdict: "Verdict | None", hashed: bool, every: bool
) -> None:
    """Tables for people."""
    data = facts(contents, verdict, hashed)
    provenance = contents.format.provenance
    console.print(_layer_table(data["layers"], every))
    console.print(_size_table(data))
    made = {
        "base model": provenance.base_model + (f" at {provenance.revision}" if provenance.revision else ""),
        "recipe": f"{provenance.recipe}, seed {provenance.seed}",
        "calibration": ", ".join(f"{key} {value}" for key, value in provenance.calibration.items()) or "none",
        "activations": "not quantized" if contents.format.bits == 16 else f"{contents.format.bits} bits",
        "head": "8 bits" if contents.format.lm_head is not None else "as it was",
        "made with": f"bwla {provenance.bwla_version}",
    }
    for key, value in made.items():
        console.print(f"{key:<12} {escape(value)}", highlight=False, soft_wrap=True)
    if verdict is None:
        reason = "no bwla_hashes.json, so the files cannot be compared" if hashed else "not checked"
        console.print(f"{'integrity':<12} {reason}", highlight=False, soft_wrap=True)
    else:
        colour = "green" if verdict.intact else "bold red"
        console.print(
            f"{'integrity':<12} [{colour}]{escape(str(verdict))}[/]", highlight=False, soft_wrap=True
        )


def _layer_table(rows: list[dict[str, Any]], every: bool) -> Table:
    from bwla_converter.checkpoint.contents import kind_of

    table = Table(title="quantized linears")
    table.add_column("layer", no_wrap=True)
    for title in ("count", "N x K", "rotation", "rank", "bits / weight", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        name = row["name"] if every else kind_of(row["name"])
        groups.setdefault((name, *row["shape"], *row["rotation"], row["rank"]), []).append(row)
    for (name, n, k, blocks, n1, n2, rank), members in groups.items():
        table.add_row(
            name,
            str(len(members)),
            f"{n} x {k}",
            f"{blocks} x ({n1} x {n2})",
            str(rank),
            f"{members[0]['bits_per_weight']:.3f}",
            f"{sum(row['bytes'] for row in members):,}",
        )
    return table


def _size_table(data: dict[str, Any]) -> Table:
    table = Table(title=f"{data['bits_per_weight']:.4f} bits per quantized weight, all-in")
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
