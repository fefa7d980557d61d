"""`bwla-convert`: the command line of the converter."""

import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from bwla_kernels.errors import BWLAError
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

EXAMPLES = """
Examples:

  bwla-convert Qwen/Qwen3-8B ./qwen3-8b-bwla

  bwla-convert ./my-llama ./my-llama-bwla --recipe fast --calibration texts/ --samples 128

  bwla-convert ./my-llama ./my-llama-bwla --rank 16 --abits 8 --seed 1

  vllm serve ./qwen3-8b-bwla --quantization bwla
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def version_line() -> str:
    """Versions of everything that matters for a bug report."""
    parts = []
    for package in ("bwla", "torch", "transformers", "safetensors", "compressed-tensors"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} missing")
    return ", ".join(parts)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_line())
        raise typer.Exit


def parse_auto(text: str, option: str) -> int | None:
    """'auto' -> None, a number -> itself.

    Raises:
        typer.BadParameter: neither.
    """
    if text == "auto":
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"expected auto or a number like 16, found {text!r}", param_hint=option)
    return int(text)


@app.command(epilog=EXAMPLES)
def convert(
    model: Annotated[str, typer.Argument(help="A folder with a Hugging Face model, or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to create; it appears whole or not at all.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="paper: OKT + PSP as published, without calibration data. fast: by the inputs that text gives."
        ),
    ] = "paper",
    calibration: Annotated[
        str | None,
        typer.Option(help="Text for recipe fast: a .txt or .jsonl file, a folder of them, wikitext2 or c4."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 2048,
    rank: Annotated[
        str,
        typer.Option(
            help="Rank of the low-rank correction: auto (up to 1.16 all-in bits a weight) or a number."
        ),
    ] = "auto",
    abits: Annotated[
        int, typer.Option(help="Activation bits: 2 to 8, or 16 to leave activations as they are.")
    ] = 6,
    clip: Annotated[
        float, typer.Option(help="Share of the largest activation that the largest code stands for.")
    ] = 1.0,
    lm_head_bits: Annotated[
        str,
        typer.Option(
            help="Bits of the language-model head: 8, 16 (as it is) or auto (8 where it is untied or large)."
        ),
    ] = "auto",
    seed: Annotated[
        int, typer.Option(help="Seed of everything random; the same seed gives the same bytes.")
    ] = 0,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="A linear to leave as it is: its name, the end of it, or re:PATTERN; may be repeated."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a model already.")
    ] = False,
    dummy: Annotated[
        bool,
        typer.Option(
            "--dummy", help="Write random weights; MODEL needs a config.json only (to measure speed)."
        ),
    ] = False,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit."),
    ] = False,
) -> None:
    """Convert a language model to 1-bit weights and few-bit activations, served by vLLM."""
    console = Console(stderr=True)
    # Imported here, so that --help and --version answer at once.
    from bwla_converter.calibration import Calibration
    from bwla_converter.dummy import write_dummy
    from bwla_converter.pipeline import Options
    from bwla_converter.pipeline import convert as run
    from bwla_converter.progress import ProgressListener

    options = Options(
        model,
        out,
        recipe=recipe,
        rank=parse_auto(rank, "--rank"),
        bits=abits,
        clip=clip,
        seed=seed,
        overwrite=overwrite,
        ignore=tuple(ignore or ()),
        head_bits=parse_auto(lm_head_bits, "--lm-head-bits"),
        calibration=None if calibration is None else Calibration(calibration, samples, length),
    )
    try:
        if dummy:
            plan = write_dummy(options)
            typer.echo(
                f"{out}: random weights, rank {plan.rank}, {plan.bits_per_weight:.3f} bits per weight all-in"
            )
            return
        with Progress(*ProgressListener.columns(), console=console) as progress:
            summary = run(options, ProgressListener(progress))
    except BWLAError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"interrupted: {out} was not written", soft_wrap=True)
        raise typer.Exit(130) from None
    except OSError as error:
        console.print(
            f"[bold red]error:[/] {escape(str(error))}: {escape(str(out))} was not written", soft_wrap=True
        )
        raise typer.Exit(1) from None
    worst = max(summary.layers, key=lambda layer: layer.error)
    typer.echo(
        f"{summary.out}: {summary.bits_per_weight:.3f} bits per quantized weight all-in (rank {summary.rank}, "
        f"{summary.weights:,} weights), {summary.bytes_before:,} -> {summary.bytes_after:,} bytes "
        f"({summary.bytes_before / summary.bytes_after:.2f}x smaller), worst layer {worst.name} "
        f"(relative error {worst.error:.3f}), {summary.seconds:.1f} s"
    )


def main() -> None:
    """Entry point of `bwla-convert`."""
    logging.captureWarnings(True)
    app()


if __name__ == "__main__":
    main()
