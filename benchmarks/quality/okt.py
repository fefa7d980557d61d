"""Measure what OKT's objective and over-relaxation do to the error of the binarized weight, and how long they take.

    python -m benchmarks.quality.okt --out benchmarks/results/okt.json

Each rotation is learned from the original weights of some decoder layers; some of the rotated rows are then binarized
by the converter's own search with one to four planes, each weight as important as the other (H = I). Errors are the
mean over the input groups of the error in units of that of 40 plain rounds with two peaks, v <= 0.15.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from bwla_converter.common.tensors import row_rms
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.okt.mixture import VARIANCE_CEILING, MixtureObjective
from bwla_converter.quantize.okt.moment import POWER, MomentObjective
from bwla_converter.quantize.okt.rotation import StartObjective, learn_rotation
from bwla_converter.source.model import open_source
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format.layer import MAX_PLANES
from bwla_kernels.reference import rotate
from bwla_kernels.sign_search import Metric, Target, gptq_binarize
from torch import Tensor

from benchmarks.common.real_models import MODELS
from benchmarks.common.record import write_result
from benchmarks.common.texts import model_folder

STRIDE = 3
"""One of so many rows is binarized."""


@dataclass(frozen=True)
class Setting:
    """How a rotation is learned.

    Attributes:
        words: the objective, in words.
        objective, rounds, relaxation: arguments of `learn_rotation`.
    """

    words: str
    objective: StartObjective
    rounds: int = 20
    relaxation: float = 1.0


def mixture(ceiling: float, rounds: int = 20, relaxation: float = 1.0) -> Setting:
    """Return a setting with the likelihood of two peaks."""
    start = partial(MixtureObjective.start, ceiling=ceiling)
    return Setting(f"two peaks, v <= {ceiling:g}", start, rounds, relaxation)


def moment(power: int, rounds: int = 20, relaxation: float = MomentObjective.first_relaxation) -> Setting:
    """Return a setting with a moment of the weights."""
    return Setting(f"mean of abs(w)^{power}", partial(MomentObjective.start, power=power), rounds, relaxation)


PLAIN = mixture(0.15, 40)
"""The setting that the errors of the others are compared with."""

SETTINGS = (
    PLAIN,
    *(mixture(0.15, rounds) for rounds in (0, 20, 160)),
    *(
        mixture(ceiling, 20, MixtureObjective.first_relaxation)
        for ceiling in (0.15, VARIANCE_CEILING, 0.6, 1.0)
    ),
    mixture(VARIANCE_CEILING, 20, 8.0),
    mixture(VARIANCE_CEILING, 40, MixtureObjective.first_relaxation),
    *(moment(power) for power in (3, 4, POWER, 6)),
    moment(POWER, relaxation=1.0),
    *(moment(POWER, relaxation=factor) for factor in (64.0, 4096.0)),
    moment(POWER, rounds=40),
)


def groups_of(model: str, layers: list[int]) -> Iterator[list[Tensor]]:
    """Yield the weights of each input group of some decoder layers, float32 [N_i, K] each."""
    source = open_source(str(model_folder(model)))
    for index in layers:
        for _, names in source.groups_of_layer(index):
            read = source.read([f"{name}.weight" for name in names])
            yield [weight.float() for weight in read.values()]


def errors_of(rows: Tensor) -> list[float]:
    """Return the mean squared error of rows [N, K] of mean square 1 in each number of planes."""
    metric = Metric.of(torch.eye(rows.shape[1]))
    target, effort = Target.of(rows, metric), FastOptions().effort(last=True)
    planes = range(1, MAX_PLANES + 1)
    return [
        float(gptq_binarize(target, metric, effort, count).error.mean()) / rows.shape[1] for count in planes
    ]


def measure(groups: list[list[Tensor]], setting: Setting) -> tuple[Tensor, float]:
    """Return the errors [groups, planes] with a setting, and the seconds that learning took."""
    errors, seconds = [], 0.0
    for number, weights in enumerate(groups):
        begun = time.perf_counter()
        rotation = learn_rotation(
            weights,
            choose_rotation(weights[0].shape[1]),
            objective=setting.objective,
            rounds=setting.rounds,
            generator=torch.Generator().manual_seed(number),
            relaxation=setting.relaxation,
        )
        seconds += time.perf_counter() - begun
        rows = torch.cat(weights)[::STRIDE]
        errors.append(
            errors_of(rotate(rows / row_rms(rows).float().unsqueeze(1), rotation.left, rotation.right))
        )
    return torch.tensor(errors), seconds


def main() -> int:
    """Measure all settings; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", help=f"{', '.join(MODELS)}, or a folder (smollm2-135m)")
    add("--layers", type=int, nargs="+", default=[1, 14], help="decoder layers (1 14)")
    add("--threads", type=int, default=1, help="threads (1)")
    add("--out", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    groups = list(groups_of(arguments.model, arguments.layers))
    rows, plain = [], None
    for setting in SETTINGS:
        errors, seconds = measure(groups, setting)
        plain = errors if plain is None else plain
        relative = (errors / plain).mean(0).tolist()
        rows.append(
            {
                "model": Path(arguments.model).name,
                "groups": len(groups),
                "objective": setting.words,
                "rounds": setting.rounds,
                "relaxation": setting.relaxation,
                "errors": [round(value, 4) for value in relative],
                "seconds": round(seconds, 2),
            }
        )
        values = " ".join(f"{value:.4f}" for value in relative)
        print(
            f"{setting.words}, {setting.rounds}, {setting.relaxation:g}: {values} {seconds:.1f} s", flush=True
        )
    if arguments.out:
        write_result(arguments.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
