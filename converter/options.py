"""Options of a conversion, and what it returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RecipeName = Literal["data-free", "paper", "fast", "best"]


@dataclass(frozen=True)
class Calibration:
    """The calibration text and how much of it is used.

    Attributes:
        source: a .txt or .jsonl file, a folder of them, or the name of a dataset: "wikitext2" or "c4".
        num_samples: number of calibration samples, at least 1.
        max_seq_length: length of each sample in tokens, at least 2.
    """

    source: str
    num_samples: int = 128
    max_seq_length: int = 2048


@dataclass(frozen=True)
class Options:
    """Options of a conversion, the same as those of `bwla-convert`.

    Every option can change the tensors of the result, except `out`, `overwrite`, `resume`, `restart`, `max_memory` and
    the reporting options `report`, `text_samples` and `hub_repo`. On one machine, equal options give equal tensors.

    Attributes:
        model: a folder with a Hugging Face model, a GGUF file, or the id of a model on the Hub, like "Qwen/Qwen3-8B".
        out: the folder to create. It appears complete or not at all.
        recipe: "data-free" uses the weights alone and makes most pretrained models unusable; "paper" is the published
            method with calibration text; "fast", our own, loses much less; "best" also tunes by gradients.
        planes: binary planes of every weight, 1 to 4: it becomes a sum of that many sign matrices with row scales. More
            than 1 need the recipe "fast".
        rank: rank of the low-rank correction, 0 or more and at most the smaller side of every weight. None: the largest
            that keeps the whole model within 1.16 bits per weight, or `planes` + 0.2 for several planes, lowered to a
            multiple of 16 if a GPU would have to pad it by more than half of the last 16 columns.
        bits: bits of the activations, 2 to 8, or 16 to leave them unquantized.
        clip: clipping ratio of the activations: their quantization range as a fraction of the largest magnitude, above
            0 and at most 1. None: 1, or one chosen for each input group if `bits` is at most 4 and the recipe uses
            calibration text.
        seed: seed of the random numbers.
        overwrite: replace `out` if it is a model already.
        head_bits: bits of the language-model head, 8, or 16 to leave it as it is. None: 8 if it is untied or large.
        ignore: linears to leave unquantized: their names, ends of names, or "re:" and a regular expression.
        calibration: the calibration text, which all recipes but "data-free" need.
        tune_epochs: recipe "best": passes over the calibration samples to tune each decoder layer, 0 or more. None: the
            recipe's default.
        distill_epochs: recipe "best": passes over the calibration samples to distill the whole model, 0 or more. None:
            the recipe's default.
        minutes: recipe "best": time limit in minutes for tuning and distillation together, half for each. The result
            then depends on the speed of the machine. None: no limit.
        resume: continue an interrupted conversion to `out`, or start one if there is none.
        restart: discard an interrupted conversion to `out`. Cannot be combined with `resume`.
        device: where to compute: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.
        threads: threads on the CPU. None: one for each core that may be used, or fewer if the model is too small for
            them. The number can change the last bits of sums, and with them the result.
        max_memory: bytes of memory that the process may use. Hidden states are kept on disk if they do not fit. None:
            what is free.
        report: write `bwla_report.html`, and collect the statistics that it shows.
        text_samples: number of prompts that the original and the converted model continue for the report, 0 to 8. None:
            3 for small models, else 0.
        hub_repo: repository on the Hub, "owner/name", that the model card shows in its commands.
    """

    model: str
    out: Path
    recipe: RecipeName = "data-free"
    planes: int = 1
    rank: int | None = None
    bits: int = 6
    clip: float | None = None
    seed: int = 0
    overwrite: bool = False
    head_bits: int | None = None
    ignore: tuple[str, ...] = ()
    calibration: Calibration | None = None
    tune_epochs: int | None = None
    distill_epochs: int | None = None
    minutes: float | None = None
    resume: bool = False
    restart: bool = False
    device: str = "auto"
    threads: int | None = None
    max_memory: int | None = None
    report: bool = True
    text_samples: int | None = None
    hub_repo: str | None = None


@dataclass(frozen=True)
class LinearReport:
    """What is reported about one quantized linear.

    Attributes:
        name: its name in the model, like "model.layers.0.self_attn.q_proj".
        weights: number of its weights.
        error: relative error of its weight, or of its output if the recipe uses calibration text; see
            `quantize.group.GroupResult`.
        clip: clipping ratio of its input activations.
    """

    name: str
    weights: int
    error: float
    clip: float = 1.0


@dataclass(frozen=True)
class Summary:
    """The result of a conversion.

    Attributes:
        out: the folder that was created.
        rank: rank of the low-rank correction.
        fitting_rank: the largest rank within the limit of bits per weight, before it was lowered to `rank` for the
            sake of GPUs; equal to `rank` if the rank was given.
        bits_per_weight: stored bits per quantized weight, everything counted.
        weights: number of quantized weights.
        bytes_before: size of the original's tensors in bytes.
        bytes_after: size of the result's tensors in bytes.
        seconds: time in seconds, over all sessions of a resumed conversion.
        linears: the quantized linears, in execution order.
    """

    out: str
    rank: int
    fitting_rank: int
    bits_per_weight: float
    weights: int
    bytes_before: int
    bytes_after: int
    seconds: float
    linears: list[LinearReport]
