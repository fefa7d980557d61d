"""The options of `bwla-convert`, one class for each panel of its `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from bwla_converter.cli.arguments import (
    Panel,
    Private,
    PushToHub,
    parse_clip,
    parse_device,
    parse_rank,
    parse_size,
)
from bwla_converter.options import RecipeName


def _refuse_old_name(value: str | None) -> None:
    if value is not None:
        raise typer.BadParameter("now called --num-calibration-samples and --max-seq-length")


@dataclass(frozen=True)
class ModelAndOutput(Panel):
    """What is converted, and where to."""

    title = "Model and output"

    model: Annotated[
        str,
        typer.Argument(
            help="A folder with a Hugging Face model, a GGUF file, or the id of a model on the Hub.",
            metavar="MODEL",
        ),
    ]
    out: Annotated[
        Path | None,
        typer.Argument(
            help="The folder to create. It appears complete or not at all. Not needed with --plan.",
            metavar="OUT",
        ),
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model already.")] = (
        False
    )
    dummy: Annotated[
        bool,
        typer.Option(
            "--dummy",
            help="Write random weights, to measure speed and memory. MODEL only needs a config.json.",
        ),
    ] = False
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print what would be quantized and what not, the size, and the expected memory and time; write "
            "nothing. MODEL only needs a config.json.",
        ),
    ] = False


@dataclass(frozen=True)
class Quantization(Panel):
    """How the model is quantized."""

    title = "Quantization"

    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="auto: fast, or lossless for a model that has one-bit or ternary weights already (Bonsai, BitNet). "
            "fast: our own method, calibrated on sample text. best: fast, then tuned by gradients; takes hours. "
            "paper: the published method, calibrated too. data-free: from the weights alone; makes most pretrained "
            "models unusable. lossless: stores one-bit or ternary weights as they are."
        ),
    ] = "auto"
    planes: Annotated[
        int,
        typer.Option(
            min=1,
            max=4,
            help="Binary planes of each weight: a sum of sign matrices. Each costs one bit and cuts the error; recipes "
            "fast and best.",
        ),
    ] = 1
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per quantized weight, everything counted, 1.1 to 4.5. Planes go to the input groups in which "
            "they gain the most, by sensitivities that are measured on the calibration text.",
            show_default="--planes decides",
        ),
    ] = None
    loss: Annotated[
        float | None,
        typer.Option(
            help="Increase of the loss to keep within, in nats per token, like 0.05: the smallest model that is "
            "predicted to. Chooses 8 activation bits where 6 cost much of it, unless --abits is given.",
            show_default="--planes decides",
        ),
    ] = None
    rank: Annotated[
        int | None,
        typer.Option(
            parser=parse_rank,
            metavar="INTEGER|auto",
            show_default="auto",
            help="Rank of the low-rank correction. auto: the largest within 1.16 bits per weight, everything counted, "
            "lowered to a multiple of 16 where a GPU would pad more than half of the last 16 columns.",
        ),
    ] = None
    abits: Annotated[
        int | None,
        typer.Option(
            help="Activation bits: 2 to 8, or 16 for unquantized activations.",
            show_default="6, 8 with lossless",
        ),
    ] = None
    clip: Annotated[
        float | None,
        typer.Option(
            parser=parse_clip,
            metavar="FLOAT|auto",
            show_default="auto",
            help="Clipping ratio: quantization range of the activations as a fraction of absmax. auto: 1, or chosen "
            "for each input group if there is calibration text and at most 4 activation bits.",
        ),
    ] = None
    lm_head_bits: Annotated[
        Literal["auto", "2", "3", "4", "8", "16"],
        typer.Option(
            help="Bits of the language-model head: 2 to 4 for as many binary planes (recipes fast and best), 8, or 16 "
            "to leave it as it is. auto: 8 if it is untied or large, or tied to an 8-bit embedding."
        ),
    ] = "auto"
    embedding_bits: Annotated[
        Literal["auto", "8", "16"],
        typer.Option(
            help="Bits of the embedding, which a tied head shares; 16 leaves it as it is. auto: 8 where vLLM can serve "
            "it and --lm-head-bits allows it."
        ),
    ] = "auto"
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A linear to leave unquantized: its name, the end of its name, or re:PATTERN. May be repeated.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Random seed. The same seed gives the same bytes.")] = 0


@dataclass(frozen=True)
class CalibrationText(Panel):
    """Calibration text for the recipes that use it."""

    title = "Calibration (recipes paper, fast and best)"

    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Calibration text: a text or JSON file, a folder of them, wikitext2, c4, or self: text that the model "
            "writes itself.",
            show_default="self",
        ),
    ] = None
    num_calibration_samples: Annotated[
        int | None,
        typer.Option(
            help="Number of calibration samples.", min=1, show_default="128 on a GPU, 32 on the CPU"
        ),
    ] = None
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            help="Length of each sample in tokens.",
            min=2,
            show_default="2048 on a GPU, 1024 on the CPU, at most what the model can read",
        ),
    ] = None
    old_names: Annotated[
        str | None, typer.Option("--samples", "--length", hidden=True, callback=_refuse_old_name)
    ] = None


@dataclass(frozen=True)
class Training(Panel):
    """Gradient-based tuning."""

    title = "Training (recipe best)"

    tune_epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the samples to tune each decoder layer; 0 to skip tuning.",
            min=0,
            show_default="3",
        ),
    ] = None
    distill_epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the samples to distill the whole model; 0 to skip distillation.",
            min=0,
            show_default="4",
        ),
    ] = None
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time limit for tuning and distillation together. The result then depends on the machine's speed.",
            min=0.1,
        ),
    ] = None


@dataclass(frozen=True)
class Resume(Panel):
    """What to do with an interrupted conversion."""

    title = "Resume"

    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume from OUT.work (bit-identical result). Fails if inputs changed; starts fresh if there is "
            "nothing to resume.",
        ),
    ] = False
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Discard the interrupted conversion in OUT.work and start fresh."),
    ] = False


@dataclass(frozen=True)
class Machine(Panel):
    """Where the conversion runs."""

    title = "Machine"

    device: Annotated[
        str,
        typer.Option(
            parser=parse_device,
            metavar="auto|cpu|cuda",
            help="Where to compute; cuda:1 is the second GPU. auto: a GPU if there is one.",
        ),
    ] = "auto"
    gpus: Annotated[
        int,
        typer.Option(
            help="Number of processes, each on a GPU, that share the calibration samples (recipes paper and fast).",
            min=1,
        ),
    ] = 1
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads on the CPU. The result can depend on their number.",
            min=1,
            show_default="the cores that may be used, fewer for tiny models",
        ),
    ] = None
    max_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            show_default="what is free",
            help="Limit of memory, like 12GB. Hidden states are kept on disk if they do not fit.",
        ),
    ] = None


@dataclass(frozen=True)
class Reporting(Panel):
    """The report, and the upload."""

    title = "Reporting and publishing"

    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not write bwla_report.html, nor collect its statistics.")
    ] = False
    samples_of_text: Annotated[
        int | None,
        typer.Option(
            help="Number of prompts that both models continue for the report, on the CPU.",
            show_default="3 for models below 0.25 GB, else 0",
            min=0,
            max=8,
        ),
    ] = None
    push_to_hub: PushToHub = None
    private: Private = False
