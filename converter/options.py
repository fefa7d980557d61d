"""What a conversion is asked for, what it reports, and who may listen."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on.

    Attributes:
        source: a text or JSON-lines file, a folder of them, or the name of a dataset (`wikitext2`, `c4`).
        num_samples: number of calibration samples.
        max_seq_length: length of each sample in tokens.
    """

    source: str
    num_samples: int = 128
    max_seq_length: int = 2048


@dataclass(frozen=True)
class Options:
    """What `bwla-convert` was asked for; see its --help.

    `overwrite`, `resume` and `restart` say what to do with what stands there already; all else, and the model,
    decides the result (`work.arguments_of`), but for `report`, `text_samples` (None: a few where the model is small)
    and `hub_repo` (its name in the model card), which are about what is told of it.
    """

    model: str
    out: Path
    recipe: str = "paper"
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
    max_memory: int | None = None
    report: bool = True
    text_samples: int | None = None
    hub_repo: str | None = None


@dataclass(frozen=True)
class LinearReport:
    """What happened to one linear; `error` is relative, see `group.GroupResult`; `clip` is that of its inputs."""

    name: str
    weights: int
    error: float
    clip: float = 1.0


@dataclass(frozen=True)
class Summary:
    """What a conversion produced; `seconds` counts all its sessions, `fitting_rank` is as in `plan.ConversionPlan`."""

    out: str
    rank: int
    fitting_rank: int
    bits_per_weight: float
    weights: int
    bytes_before: int
    bytes_after: int
    seconds: float
    layers: list[LinearReport]
