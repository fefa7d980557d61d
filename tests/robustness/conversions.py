"""Small conversions that can be killed, for the test of resuming.

The models are tiny and the recipes do fewer rounds than usual, so that a conversion spends most of its time between
layers.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bwla_converter import pipeline
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.checkpoint import merge
from bwla_converter.options import Calibration, Options, RecipeName
from bwla_converter.quantize import data_free, fast, paper
from bwla_converter.recipes import base as recipes
from bwla_converter.recipes import fast as calibrated
from bwla_converter.recipes.base import RECIPES, Recipe
from bwla_converter.source.gguf_path import CACHE_VARIABLE
from bwla_converter.source.model import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import read_folder, read_tensors
from torch import Tensor

from benchmarks.common.record import ROOT
from benchmarks.common.tiny_models import EXPERTS, Family, write_model

EXAMPLE = ROOT / "examples"
DONE, REFUSED, CRASHED = 0, 3, 4
"""Exit codes of a conversion in a fork."""

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")

FLAGS = {
    "recipe": "--recipe",
    "rank": "--rank",
    "planes": "--planes",
    "target_bits": "--bits",
    "head_bits": "--lm-head-bits",
    "text_samples": "--samples-of-text",
}
"""Fields of `Options` -> flags of `bwla-convert`."""

CALIBRATION_FLAGS = {
    "source": "--calibration",
    "num_samples": "--num-calibration-samples",
    "max_seq_length": "--max-seq-length",
}
"""Fields of `Calibration` -> flags of `bwla-convert`."""

MODELS: Mapping[str, str | Family] = {"dense": "Qwen3", "experts": EXPERTS}
"""The models by the names of their folders; the heads are not tied."""


@dataclass(frozen=True)
class Kind:
    """A kind of conversion.

    Attributes:
        recipe: the recipe.
        options: further fields of `Options` among those in `FLAGS`.
        model: name of its model in `MODELS`.
        touched_up: whether a final step changes tensors of every layer; `bwla-convert` has no option for it.
    """

    recipe: RecipeName
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "dense"
    touched_up: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `Options` that conversions of this kind have in common."""
        return {"recipe": self.recipe, "rank": 2, "text_samples": 0, **self.options}

    def calibration(self, models: Path) -> dict[str, Any]:
        """Return the fields of `Calibration`; nothing for a recipe without calibration text."""
        if not RECIPES[self.recipe].needs_calibration:
            return {}
        return {"source": str(models / "text.txt"), "num_samples": 4, "max_seq_length": 32}


KINDS: Mapping[str, Kind] = {
    "data-free": Kind("data-free"),
    "paper": Kind("paper"),
    "fast": Kind("fast"),
    "fast with a final step": Kind("fast", touched_up=True),
    "two planes": Kind("fast", {"planes": 2}),
    "planes by bits": Kind("fast", {"rank": 0, "target_bits": 2.2}),
    "two planes, head in three": Kind("fast", {"planes": 2, "head_bits": 3}),
    "experts in two planes": Kind("fast", {"planes": 2}, model="experts"),
}
"""The kinds of conversions by name."""


class TouchUp(calibrated.FastRecipe):
    """Recipe `fast` with a final step that changes tensors of every layer, as distillation does."""

    def finish(self, folder: Path) -> dict[str, Tensor]:
        """Return all row scales, increased by 1 %."""
        entries = read_folder(folder)
        names = [name for name in entries if name.endswith("weight_scale")]
        return {name: scale * 1.01 for name, scale in read_tensors(folder, entries, names).items()}


def make_touch_up(options: Options, source: Source, store: ActivationStore) -> Recipe:
    """Return the recipe `TouchUp`."""
    assert options.calibration is not None
    return TouchUp(source, options.calibration, options.seed)


def few_rounds() -> None:
    """Reduce the number of rounds of all recipes in this process, and the size of the output's files."""
    merge.MAX_FILE_BYTES = 100_000
    few = partial(data_free.DataFreeOptions, okt_rounds=2, psp_rounds=2, scale_rounds=2)
    paper_options = partial(paper.PaperOptions, okt_rounds=2, psp_rounds=2)
    fast_options = partial(fast.FastOptions, okt_rounds=2, rounds=2, sweeps=1)
    data_free.DataFreeOptions = few  # type: ignore[assignment,misc]
    recipes.PaperOptions = paper_options  # type: ignore[attr-defined,assignment]
    recipes.FastOptions = calibrated.fast.FastOptions = fast_options  # type: ignore[attr-defined,assignment,misc]


@dataclass(frozen=True)
class Case:
    """A conversion: the name of its kind, and whether it replaces an existing checkpoint."""

    name: str
    overwrite: bool

    @property
    def kind(self) -> Kind:
        """Its kind."""
        return KINDS[self.name]

    def options(self, models: Path, out: Path, seed: int = 0) -> Options:
        """Return the options for `convert`; `models` is the folder that `write_models` wrote."""
        text = self.kind.calibration(models)
        return Options(
            str(models / self.kind.model),
            out,
            seed=seed,
            overwrite=self.overwrite,
            calibration=Calibration(**text) if text else None,
            **self.kind.settings,
        )

    def arguments(self, models: Path, out: Path) -> list[str]:
        """Return the same for the command line."""
        pairs = [(FLAGS[name], value) for name, value in self.kind.settings.items()]
        pairs += [(CALIBRATION_FLAGS[name], value) for name, value in self.kind.calibration(models).items()]
        flags = [word for flag, value in pairs for word in (flag, str(value))]
        overwrite = ["--overwrite"] if self.overwrite else []
        return [str(models / self.kind.model), str(out), *flags, *overwrite]


def write_models(folder: Path) -> None:
    """Write tiny random models with the example's tokenizer, and beside them a calibration text."""
    vocabulary = json.loads((EXAMPLE / "model" / "config.json").read_text())["vocab_size"]
    for model, family in MODELS.items():
        write_model(folder / model, family, shards=4, num_hidden_layers=3, vocab_size=vocabulary)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(EXAMPLE / "model" / name, folder / model)
    text = (EXAMPLE / "text" / "calibration.txt").read_text(encoding="utf-8")
    (folder / "text.txt").write_text(text[:4000], encoding="utf-8")


def cache_path(out: Path) -> Path:
    """Return the cache of a conversion to `out`: its own, so that a kill can hit the writing of sensitivities."""
    return out.with_name(f"{out.name}.cache")


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a checkpoint except for times and memory; nothing if there is no checkpoint."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes()
        if path.name == "bwla_report.json":
            data = json.dumps({**json.loads(data), "seconds": 0, "memory": 0}).encode()
        elif path.name == "bwla_report.html":  # rendered from the JSON report
            continue
        hashes[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return hashes


def convert_alone(case: Case, options: Options) -> None:
    """Convert in this process, with a cache of its own."""
    os.environ[CACHE_VARIABLE] = str(cache_path(options.out))
    pipeline.convert(options, recipe_factory=make_touch_up if case.kind.touched_up else None)


def fork_convert(case: Case, options: Options, reason_file: Path, kill_at: "Moment | None" = None) -> int:
    """Convert in a forked process, which kills itself at the moment `kill_at`; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        code = CRASHED
        if kill_at is not None:
            kill_self_at(kill_at)
        convert_alone(case, options)
        code = DONE
    except BWLAError as error:
        reason_file.write_text(str(error))
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@dataclass(frozen=True)
class Moment:
    """A moment of a conversion: just before its file operation `number`, counted within a folder or everywhere."""

    number: int
    within: Path | None = None


def kill_self_at(moment: Moment) -> None:
    """Make this process kill itself with SIGKILL at a moment."""
    operations, folder = 0, str(moment.within or "")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal operations
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            operations += 1
            if operations == moment.number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_operations(case: Case, options: Options) -> int:
    """Return the number of file operations of a whole conversion."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        total = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal total
            total += event in FILE_EVENTS

        sys.addaudithook(hook)
        convert_alone(case, options)
        os.write(writer, str(total).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return int(text)


def wait(child: int, seconds: float | None) -> int | None:
    """Wait for a child; return its exit code (negative for a signal), or None if it still runs after `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None
