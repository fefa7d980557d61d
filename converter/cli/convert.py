"""`bwla-convert`: the command line of the converter."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from bwla_converter.cli.arguments import with_panels
from bwla_converter.cli.convert_options import (
    CalibrationText,
    Machine,
    ModelAndOutput,
    Quantization,
    Reporting,
    Resume,
    Training,
)
from bwla_converter.cli.errors import errors_reported
from bwla_converter.cli.interrupt import Interrupts, handled
from bwla_converter.common.versions import bug_report_line
from bwla_converter.options import AUTOMATIC, SELF, Calibration, Options
from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from bwla_converter.options import Summary

EXAMPLES = """
Examples:

  bwla-convert Qwen/Qwen3-8B ./qwen3-8b-bwla

  bwla-convert ./my-llama ./my-llama-bwla --bits 2.2

  bwla-convert ./my-llama ./my-llama-bwla --calibration texts/ --bits 2.2

  bwla-convert ./my-llama.Q8_0.gguf ./my-llama-bwla

  bwla-convert ./my-llama ./my-llama-bwla --rank 16 --abits 8 --seed 1

  bwla-convert ./my-llama ./my-llama-bwla --rank 16 --abits 8 --seed 1 --resume

  bwla-convert --plan ./my-llama

  vllm serve ./qwen3-8b-bwla --quantization bwla
"""

NO_OUTPUT = Path()
"""Stands for the output folder with --plan, which writes nothing."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(bug_report_line())
        raise typer.Exit


@app.command(epilog=EXAMPLES)
@with_panels
def convert(
    target: ModelAndOutput,
    quantization: Quantization,
    text: CalibrationText,
    training: Training,
    resuming: Resume,
    machine: Machine,
    reporting: Reporting,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and exit."),
    ] = False,
) -> None:
    """Convert a language model to 1-bit weights and low-bit activations, to be served by vLLM."""
    if target.out is None and not target.plan:
        raise typer.BadParameter("expected the folder to create, found none", param_hint="OUT")
    head_bits, embedding_bits = quantization.lm_head_bits, quantization.embedding_bits
    calibration = None
    if text.calibration is not None or quantization.recipe != "data-free":
        amounts = (text.num_calibration_samples or AUTOMATIC, text.max_seq_length or AUTOMATIC)
        calibration = Calibration(text.calibration or SELF, *amounts)
    options = Options(
        target.model,
        target.out or NO_OUTPUT,
        recipe=quantization.recipe,
        planes=quantization.planes,
        target_bits=quantization.bits,
        target_loss=quantization.loss,
        rank=quantization.rank,
        bits=quantization.abits,
        clip=quantization.clip,
        seed=quantization.seed,
        overwrite=target.overwrite,
        head_bits=None if head_bits == "auto" else int(head_bits),
        embedding_bits=None if embedding_bits == "auto" else int(embedding_bits),
        ignore=tuple(quantization.ignore or ()),
        calibration=calibration,
        tune_epochs=training.tune_epochs,
        distill_epochs=training.distill_epochs,
        minutes=training.minutes,
        resume=resuming.resume,
        restart=resuming.restart,
        device=machine.device,
        threads=machine.threads,
        max_memory=machine.max_memory,
        report=not reporting.no_report,
        text_samples=reporting.samples_of_text,
        hub_repo=reporting.push_to_hub,
    )
    console = Console(stderr=True)
    if target.plan:
        _print_plan(console, options)
        return
    if reporting.push_to_hub is not None:
        _check_push(console, reporting.push_to_hub)
    if target.dummy:
        _write_dummy(console, options)
        return
    summary = _convert(console, options, machine.gpus)
    if summary is None:
        return
    if options.recipe == "data-free":
        console.print(
            "warning: recipe data-free makes most pretrained models unusable: use --recipe fast",
            soft_wrap=True,
        )
    typer.echo(_describe(summary))
    if reporting.push_to_hub is not None:
        _push(console, options.out, reporting.push_to_hub, reporting.private)


# Below, torch and transformers are imported where they are used, so that --help and --version answer at once.


def _check_push(console: Console, repo: str) -> None:
    """Check before the conversion that the result can be uploaded."""
    from bwla_converter.checkpoint.hub import check_push

    with errors_reported(console):
        check_push(repo)


def _push(console: Console, out: Path, repo: str, private: bool) -> None:
    from bwla_converter.checkpoint.hub import push

    with errors_reported(console):
        typer.echo(f"pushed to {push(out, repo, private or None)}")


def _print_plan(console: Console, options: Options) -> None:
    from bwla_converter.describe import describe_conversion

    with errors_reported(console):
        typer.echo(describe_conversion(options))


def _write_dummy(console: Console, options: Options) -> None:
    from bwla_converter.checkpoint.dummy import write_dummy
    from bwla_converter.common.bits import describe_rank

    with errors_reported(console, lambda: f"{options.out} was not written"):
        plan = write_dummy(options)
    typer.echo(
        f"{options.out}: random weights, {describe_rank(plan.rank, plan.fitting_rank)}, "
        f"{plan.bits_per_weight:.3f} bits per weight, everything counted"
    )


def _convert(console: Console, options: Options, gpus: int) -> "Summary | None":
    """Run the conversion with progress bars; return None in every process but the first."""
    from bwla_converter.calibration.distributed import join_processes, leave_processes, start_processes
    from bwla_converter.cli.progress import ProgressListener
    from bwla_converter.common.devices import choose_device
    from bwla_converter.conversion import default_amounts
    from bwla_converter.pipeline import convert, follow

    interrupts = Interrupts(lambda line: console.print(line, soft_wrap=True))
    try:
        with errors_reported(console, lambda: _how_to_continue(options.out), lambda: interrupts.exit_code):
            start_processes(gpus)
            device = choose_device(options.device)
            default, _ = default_amounts(device)
            num_samples = (options.calibration.num_samples or default) if options.calibration else 0
            processes = join_processes(options.recipe, device, num_samples)
            with handled(interrupts), Progress(*ProgressListener.columns(), console=console) as progress:
                if processes.process_rank:
                    follow(options, processes)
                    return None
                return convert(options, ProgressListener(progress, interrupts), processes=processes)
    finally:
        leave_processes()


def _how_to_continue(out: Path) -> str:
    """Say what an interrupted conversion has left, and how to continue it."""
    from bwla_converter.resume.work_folder import work_path

    work = work_path(out)
    if not work.exists():
        return f"{out} was not written, and no layer is finished yet: start again"
    return f"{out} was not written; the finished layers are in {work}: add --resume to the same command to continue"


def _describe(summary: "Summary") -> str:
    """Describe the result in one line."""
    from bwla_converter.common.bits import describe_rank

    worst = max(summary.linears, key=lambda linear: linear.error)
    return (
        f"{summary.out}: {summary.bits_per_weight:.3f} bits per quantized weight, everything counted, "
        f"{describe_rank(summary.rank, summary.fitting_rank)}, {summary.weights:,} weights, "
        f"{summary.bytes_before:,} -> {summary.bytes_after:,} bytes "
        f"({summary.bytes_before / summary.bytes_after:.2f}x smaller), largest relative error {worst.error:.3f} "
        f"({worst.name}), {summary.seconds:.1f} s{_describe_losses(summary)}"
        + "".join(f"\n{note}" for note in summary.notes)
    )


def _describe_losses(summary: "Summary") -> str:
    """Describe the predicted and the measured loss; an empty string without calibration text."""
    if summary.predicted_loss is None:
        return ""
    measured = ""
    if summary.measured_loss is not None:
        measured = f", {summary.measured_loss:.3g} measured on text of the calibration file that was not used"
    return (
        f"\nloss against the original: {summary.predicted_loss:.3g} {summary.loss_unit} predicted{measured}"
    )


def main() -> None:
    """Entry point of `bwla-convert`."""
    logging.captureWarnings(True)
    app()


if __name__ == "__main__":
    main()
