"""Options of a conversion, and what it returns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

RecipeName = Literal["auto", "data-free", "paper", "fast", "best", "lossless"]

AUTO_RECIPE: Final = "auto"
"""Recipe that stands for `lossless` or `fast`, as the model's weights decide (`planning.choose`)."""

SELF = "self"
"""Name of the calibration text that the model writes itself."""

HEAD_PLANES = (2, 3, 4)
"""Numbers of binary planes that a head can be stored in; one would lose the small differences between logits."""

AUTOMATIC = 0
"""Number of calibration samples, or length, that is chosen by the device and the model."""


@dataclass(frozen=True)
class Calibration:
    """The calibration text and how much of it is used.

    Attributes:
        source: a text or JSON file, a folder of them, the name of a dataset, "wikitext2" or "c4", or "self" for text
            that the model writes itself.
        num_samples: number of calibration samples; `AUTOMATIC`: 128 on a GPU, 32 on the CPU.
        max_seq_length: length of each sample in tokens, at least 2; `AUTOMATIC`: 2048 on a GPU, 1024 on the CPU, and
            not more than the model has positions.
        written: file with the samples that the model has written; the conversion sets it.
    """

    source: str = SELF
    num_samples: int = AUTOMATIC
    max_seq_length: int = AUTOMATIC
    written: Path | None = None


@dataclass(frozen=True)
class Options:
    """Options of a conversion, the same as those of `bwla-convert`.

    Every option can change the tensors of the result, except `out`, `overwrite`, `resume`, `restart`, `max_memory` and
    the reporting options `report`, `text_samples` and `hub_repo`. On one machine, equal options give equal tensors.

    Attributes:
        model: a folder with a Hugging Face model, a GGUF file, or the id of a model on the Hub, like "Qwen/Qwen3-8B".
        out: the folder to create. It appears complete or not at all.
        recipe: "auto" is "lossless" for a model whose weights have one bit or three values already, unless an option
            asks for planes, a size, a rank, a clip or a calibration text, and "fast" for all others; "data-free" uses
            the weights alone and makes most pretrained models unusable; "paper" is the published method with
            calibration text; "fast", our own, loses much less; "best" also tunes by gradients; "lossless" stores
            one-bit and ternary weights as they are.
        planes: binary planes of every weight, 1 to 4: it becomes a sum of that many sign matrices with row scales. More
            than 1 need the recipe "fast" or "best".
        target_bits: stored bits per quantized weight, everything counted, that the planes of the input groups may take
            together; each group gets as many as pay off most. Excludes `planes` and `target_loss`. None: `planes`.
        target_loss: increase of the loss, in nats per token, that the planes are chosen for; the fewest that are
            predicted to keep within it. Excludes `planes` and `target_bits`. None: `planes`.
        rank: rank of the low-rank correction, 0 or more and at most the smaller side of every weight. None: the largest
            that keeps the whole model within 1.16 bits per weight, or `planes` + 0.2 for several planes, lowered to a
            multiple of 16 if a GPU would have to pad it by more than half of the last 16 columns. With `target_bits` or
            `target_loss`: 0, as bits gain more in planes, or what 4 planes everywhere leave of `target_bits`.
        bits: bits of the activations, 2 to 8, or 16 to leave them unquantized. None: 6, or 8 where `target_loss` is
            reached with fewer planes that way, and 8 for the recipe "lossless".
        clip: clipping ratio of the activations: their quantization range as a fraction of the largest magnitude, above
            0 and at most 1. None: 1, or one chosen for each input group if `bits` is at most 4 and the recipe uses
            calibration text.
        seed: seed of the random numbers.
        overwrite: replace `out` if it is a model already.
        head_bits: bits of the language-model head: 2 to 4 for as many binary planes, 8, or 16 to leave it as it is.
            None: 8 if it is untied or large, or tied to an 8-bit embedding.
        embedding_bits: bits of the embedding, 8, or 16 to leave it as it is. None: 8, unless vLLM cannot serve that
            for the model's family, or the embedding is tied to a head of 16 bits.
        ignore: linears to leave unquantized: their names, ends of names, or "re:" and a regular expression.
        calibration: the calibration text for all recipes but "data-free". None: text that the model writes itself.
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
    recipe: RecipeName = "auto"
    planes: int = 1
    target_bits: float | None = None
    target_loss: float | None = None
    rank: int | None = None
    bits: int | None = None
    clip: float | None = None
    seed: int = 0
    overwrite: bool = False
    head_bits: int | None = None
    embedding_bits: int | None = None
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

    @property
    def allocates(self) -> bool:
        """Whether the planes of each input group are chosen for a size or for a loss."""
        return self.target_bits is not None or self.target_loss is not None


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
        activation_bits: bits of the activations.
        planes: number of planes -> quantized weights with that many.
        loss_unit: unit of the losses: nats per token, or cosine distance per token of a model without a head.
        predicted_loss: predicted increase of the loss; None without calibration text.
        measured_loss: the same, measured on calibration text that the conversion did not use; None where there is none.
        predicted_losses: bits per weight -> the loss that `--bits` of that many is predicted to have.
        linears: the quantized linears, in execution order.
        notes: sentences for the user about the source: tensors that were renamed, files that were not copied.
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
    activation_bits: int = 6
    planes: dict[int, int] = field(default_factory=dict)
    loss_unit: str = "nats per token"
    predicted_loss: float | None = None
    measured_loss: float | None = None
    predicted_losses: dict[float, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
