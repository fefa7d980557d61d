"""Small conversions that can be killed, for the test of resuming.

The model is tiny and the recipes do fewer rounds than usual, so that a conversion spends most of its time between
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bwla_converter import pipeline
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.checkpoint import merge
from bwla_converter.options import Calibration, Options
from bwla_converter.quantize import data_free, fast, paper
from bwla_converter.recipes import base as recipes
from bwla_converter.recipes import fast as calibrated
from bwla_converter.recipes.base import Recipe
from bwla_converter.source.model import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import read_folder, read_tensors
from torch import Tensor

from benchmarks.common.record import ROOT
from benchmarks.common.tiny_models import write_model

EXAMPLE = ROOT / "examples"
DONE, REFUSED, CRASHED = 0, 3, 4
"""Exit codes of a conversion in a fork."""

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")
RECIPES = ("data-free", "paper", "fast", "fast with a final step")


class TouchUp(calibrated.FastRecipe):
    """Recipe `fast` with a final step that changes tensors of every layer, as distillation does."""

    def finish(self, folder: Path) -> dict[str, Tensor]:
        """Return all row scales, increased by 1 %."""
        entries = read_folder(folder)
        names = [name for name in entries if name.endswith("weight_scale")]
        return {name: scale * 1.01 for name, scale in read_tensors(folder, entries, names).items()}


def make_touch_up(options: Options, source: Source, store: ActivationStore) -> Recipe:
    """Return the recipe "fast with a final step"."""
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
    """A kind of conversion: its recipe, and whether it replaces an existing checkpoint."""

    recipe: str
    overwrite: bool

    def options(self, model: Path, out: Path, seed: int = 0) -> Options:
        """Return the options for `convert`."""
        text = Calibration(str(model.parent / "text.txt"), num_samples=4, max_seq_length=32)
        return Options(
            str(model),
            out,
            recipe=self.recipe.split()[0],
            rank=2,
            seed=seed,
            overwrite=self.overwrite,
            calibration=None if self.recipe == "data-free" else text,
            text_samples=0,
        )

    def flags(self, model: Path) -> list[str]:
        """Return the same options for the command line."""
        flags = [
            "--recipe",
            self.recipe,
            "--rank",
            "2",
            "--samples-of-text",
            "0",
            *(["--overwrite"] if self.overwrite else []),
        ]
        if self.recipe != "data-free":
            text = str(model.parent / "text.txt")
            flags += ["--calibration", text, "--num-calibration-samples", "4", "--max-seq-length", "32"]
        return flags


def write_example(folder: Path) -> None:
    """Write a tiny random Qwen3 model with the example's tokenizer, and beside it a calibration text."""
    vocabulary = json.loads((EXAMPLE / "model" / "config.json").read_text())["vocab_size"]
    write_model(folder, "Qwen3", shards=4, num_hidden_layers=3, vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / "model" / name, folder)
    text = (EXAMPLE / "text" / "calibration.txt").read_text(encoding="utf-8")
    (folder.parent / "text.txt").write_text(text[:20000], encoding="utf-8")


def digest_of(folder: Path) -> str:
    """Return a hash of a checkpoint's files except for times and memory, or "absent" if there is no checkpoint."""
    if not folder.exists():
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes()
        if path.name == "bwla_report.json":
            data = json.dumps({**json.loads(data), "seconds": 0, "memory": 0}).encode()
        elif path.name == "bwla_report.html":  # rendered from the JSON report
            continue
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()


def fork_convert(case: Case, options: Options, reason_file: Path, kill_at: int | None = None) -> int:
    """Convert in a forked process, which kills itself at its file operation number `kill_at`; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        code = CRASHED
        touch_up = case.recipe == RECIPES[2]
        if kill_at is not None:
            kill_at_operation(kill_at)
        pipeline.convert(options, recipe_factory=make_touch_up if touch_up else None)
        code = DONE
    except BWLAError as error:
        reason_file.write_text(str(error))
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_at_operation(number: int) -> None:
    """Make this process kill itself with SIGKILL just before its file operation `number`."""
    operations = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal operations
        if event in FILE_EVENTS:
            operations += 1
            if operations == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_operations(options: Options) -> int:
    """Return the number of file operations of a whole conversion."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        total = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal total
            total += event in FILE_EVENTS

        sys.addaudithook(hook)
        pipeline.convert(options)
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
