"""`bwla-convert`: the command line of the converter."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from bwla_converter.cli.interrupt import Interrupts, handled
from bwla_converter.common.versions import bug_report_line
from bwla_kernels.errors import BWLAError
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

EXAMPLES = """
Examples:

  bwla-convert Qwen/Qwen3-8B ./qwen3-8b-bwla

  bwla-convert ./my-llama ./my-llama-bwla --recipe fast --calibration texts/ --num-calibration-samples 128

  bwla-convert ./my-llama ./my-llama-bwla --rank 16 --abits 8 --seed 1

  bwla-convert ./my-llama ./my-llama-bwla --rank 16 --abits 8 --seed 1 --resume

  vllm serve ./qwen3-8b-bwla --quantization bwla
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(bug_report_line())
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


def parse_clip(text: str) -> float | None:
    """'auto' -> None, a number -> itself.

    Raises:
        typer.BadParameter: neither.
    """
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise typer.BadParameter(
            f"expected auto or a number like 0.9, found {text!r}", param_hint="--clip"
        ) from None


def parse_bytes(text: str) -> int:
    """Bytes of a size like 12GB.

    Raises:
        typer.BadParameter: it is none.
    """
    from bwla_converter.planning.budget import parse_size

    try:
        return parse_size(text)
    except ValueError:
        raise typer.BadParameter(
            f"expected a size like 12GB or 800MiB, found {text!r}", param_hint="--max-memory"
        ) from None


@app.command(epilog=EXAMPLES)
def convert(
    model: Annotated[str, typer.Argument(help="A folder with a Hugging Face model, or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to create; it appears whole or not at all.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="paper: OKT + PSP as published, without calibration data. fast: by the inputs that text gives. "
            "best: fast, then tuned by gradients (hours instead of minutes)."
        ),
    ] = "paper",
    calibration: Annotated[
        str | None,
        typer.Option(help="Text for recipe fast: a .txt or .jsonl file, a folder of them, wikitext2 or c4."),
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="Number of calibration samples.", min=1)] = 128,
    max_seq_length: Annotated[
        int, typer.Option(help="Length of a calibration sample in tokens.", min=2)
    ] = 2048,
    rank: Annotated[
        str,
        typer.Option(
            help="Rank of the low-rank correction: a number, or auto (the largest within 1.16 all-in bits a weight "
            "that fills at least half of its last 16 columns, which a GPU reads whole)."
        ),
    ] = "auto",
    abits: Annotated[
        int, typer.Option(help="Activation bits: 2 to 8, or 16 to leave activations as they are.")
    ] = 6,
    clip: Annotated[
        str,
        typer.Option(
            help="Share of the largest activation that the largest code stands for: a number up to 1, or auto "
            "(chosen for each input group up to 4 activation bits where the recipe sees text, else 1)."
        ),
    ] = "auto",
    tune_epochs: Annotated[
        int | None, typer.Option(help="Recipe best: passes over the text for each block; 0 for none.", min=0)
    ] = None,
    distill_epochs: Annotated[
        int | None,
        typer.Option(help="Recipe best: passes over the text for the whole model; 0 for none.", min=0),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Recipe best: time for tuning and distillation together. The result then depends on the machine.",
            min=0.1,
        ),
    ] = None,
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
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an interrupted conversion to OUT stopped (its blocks are in OUT.work), with the same "
            "result to the bit, or say why that cannot be; start where there is none.",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard what an interrupted conversion to OUT left in OUT.work."),
    ] = False,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Leave out bwla_report.html and the statistics that it shows.")
    ] = False,
    samples_of_text: Annotated[
        int | None,
        typer.Option(
            help="Prompts that original and result continue for the report; both are run whole on the CPU. "
            "Default: 3 where the model is below 0.25 GB, else none.",
            min=0,
            max=8,
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Upload the result to this repository, owner/name.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository a private one if it is new.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where to compute: cpu, cuda, or auto (a GPU where there is one).")
    ] = "auto",
    gpus: Annotated[
        int,
        typer.Option(
            help="Processes that share out the calibration text, each on a GPU (recipe fast).", min=1
        ),
    ] = 1,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory to get by with, like 12GB; calibration goes to disk where it does not fit. "
            "Default: what is free."
        ),
    ] = None,
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
    from bwla_converter.calibration.distributed import join_processes, leave_processes, start_processes
    from bwla_converter.checkpoint.dummy import write_dummy
    from bwla_converter.checkpoint.hub import check_push, push
    from bwla_converter.cli.progress import ProgressListener
    from bwla_converter.common.bits import describe_rank
    from bwla_converter.common.devices import choose_device
    from bwla_converter.options import Calibration, Options
    from bwla_converter.pipeline import convert as run
    from bwla_converter.pipeline import follow

    options = Options(
        model,
        out,
        recipe=recipe,
        rank=parse_auto(rank, "--rank"),
        bits=abits,
        clip=parse_clip(clip),
        tune_epochs=tune_epochs,
        distill_epochs=distill_epochs,
        minutes=minutes,
        seed=seed,
        overwrite=overwrite,
        ignore=tuple(ignore or ()),
        head_bits=parse_auto(lm_head_bits, "--lm-head-bits"),
        calibration=None
        if calibration is None
        else Calibration(calibration, num_calibration_samples, max_seq_length),
        resume=resume,
        restart=restart,
        device=device,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
        report=not no_report,
        text_samples=samples_of_text,
        hub_repo=push_to_hub,
    )
    interrupts = Interrupts(lambda line: console.print(line, soft_wrap=True))
    try:
        if push_to_hub is not None:
            check_push(push_to_hub)
        if dummy:
            plan = write_dummy(options)
            typer.echo(
                f"{out}: random weights, {describe_rank(plan.rank, plan.fitting_rank)}, "
                f"{plan.bits_per_weight:.3f} bits per weight all-in"
            )
            return
        start_processes(gpus)
        processes = join_processes(recipe, choose_device(device), num_calibration_samples)
        with handled(interrupts), Progress(*ProgressListener.columns(), console=console) as progress:
            if processes.process_rank:
                follow(options, processes)
                return
            summary = run(options, ProgressListener(progress, interrupts), processes=processes)
    except BWLAError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"interrupted: {escape(str(out))} was not written; {_way_on(out)}", soft_wrap=True)
        raise typer.Exit(interrupts.exit_code) from None
    except OSError as error:
        console.print(
            f"[bold red]error:[/] {escape(str(error))}: {escape(str(out))} was not written; {_way_on(out)}",
            soft_wrap=True,
        )
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        from bwla_converter.common.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        console.print(
            f"[bold red]error:[/] out of memory ({escape(' '.join(str(error).split())[:200])}): {escape(str(out))} "
            f"was not written; free some memory, or use a larger machine; {_way_on(out)}",
            soft_wrap=True,
        )
        raise typer.Exit(1) from None
    finally:
        leave_processes()
    if recipe == "paper":
        console.print(
            "recipe paper reproduces the publication; for far better text: --recipe fast --calibration TEXT",
            soft_wrap=True,
        )
    worst = max(summary.linears, key=lambda linear: linear.error)
    typer.echo(
        f"{summary.out}: {summary.bits_per_weight:.3f} bits per quantized weight all-in, "
        f"{describe_rank(summary.rank, summary.fitting_rank)}, {summary.weights:,} weights, "
        f"{summary.bytes_before:,} -> {summary.bytes_after:,} bytes "
        f"({summary.bytes_before / summary.bytes_after:.2f}x smaller), worst layer {worst.name} "
        f"(relative error {worst.error:.3f}), {summary.seconds:.1f} s"
    )
    if push_to_hub is not None:
        try:
            typer.echo(f"pushed to {push(out, push_to_hub, private or None)}")
        except BWLAError as error:
            console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(1) from None


def _way_on(out: Path) -> str:
    """What can be done after an interruption, for the console."""
    from bwla_converter.resume.work_folder import work_path

    work = work_path(out)
    if not work.exists():
        return "nothing was finished yet: start again"
    return f"what is finished is in {escape(str(work))}: give the same command with --resume to go on"


def main() -> None:
    """Entry point of `bwla-convert`."""
    logging.captureWarnings(True)
    app()


if __name__ == "__main__":
    main()
