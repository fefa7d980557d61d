"""SIGKILL conversions at random moments, resume them, and compare what comes out with an undisturbed conversion.

    python -m tests.robustness.kill_resume --kills 100 --out benchmarks/results/kill_resume.json

Half of the kills come after a random time, half at a random file operation of the converter's process (it counts its
own opens, renames and removals and kills itself at the chosen one), because the moments in which something on disk
changes are short and random times hardly hit them. Every second conversion replaces an older model. After each kill
the output must be absent, the older model, or the new one, whole; each resume must end in the same bytes (only
time and memory in the report may differ) or refuse with a reason.

The model is tiny and the recipes do fewer rounds than they would, so that most of the time is spent between blocks.
Conversions run in forks of this process, since loading torch and transformers costs more than converting; with
`--fresh N` the last N kills hit `bwla-convert` processes of their own.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from bwla_converter import pipeline
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.options import Calibration, Options
from bwla_converter.quantize import fast, paper
from bwla_converter.recipes import base as recipes
from bwla_converter.recipes import fast as calibrated
from bwla_converter.recipes.base import Recipe
from bwla_converter.resume.fingerprint import code_version
from bwla_converter.resume.work_folder import work_path
from bwla_converter.source.model import Source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import read_folder, read_tensors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common.record import ROOT, write_result

EXAMPLE = ROOT / "examples"
DONE, REFUSED, CRASHED = 0, 3, 4
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile")
RECIPES = ("paper", "fast", "fast and a last step")


class TouchUp(calibrated.FastRecipe):
    """`fast`, and a last step that changes tensors of every block, as whole-model tuning does."""

    def finish(self, folder: Path) -> dict[str, Tensor]:
        """Every row scale a little larger."""
        entries = read_folder(folder)
        names = [name for name in entries if name.endswith("weight_scale")]
        return {name: scale * 1.01 for name, scale in read_tensors(folder, entries, names).items()}


def make_touch_up(options: Options, source: Source, store: ActivationStore) -> Recipe:
    """Make the recipe "fast and a last step"."""
    assert options.calibration is not None
    return TouchUp(source, options.calibration, options.seed)


def few_rounds() -> None:
    """Have the recipes do fewer rounds of what they do."""
    paper_options = partial(paper.PaperOptions, okt_rounds=2, psp_rounds=2, scale_rounds=2)
    fast_options = partial(fast.FastOptions, okt_rounds=2, rounds=2, sweeps=1)
    paper.PaperOptions = paper_options  # type: ignore[assignment,misc]
    recipes.FastOptions = calibrated.fast.FastOptions = fast_options  # type: ignore[attr-defined,assignment,misc]


@dataclass(frozen=True)
class Case:
    """A conversion: its recipe and seed, and whether a model stands at its output already."""

    recipe: str
    overwrite: bool

    def options(self, model: Path, out: Path, seed: int = 0) -> Options:
        """What `convert` is told."""
        text = Calibration(str(model.parent / "text.txt"), num_samples=4, max_seq_length=32)
        return Options(
            str(model),
            out,
            recipe=self.recipe.split()[0],
            rank=2,
            seed=seed,
            overwrite=self.overwrite,
            calibration=None if self.recipe == "paper" else text,
            text_samples=0,
        )

    def flags(self, model: Path) -> list[str]:
        """The same for the command line."""
        flags = [
            "--recipe",
            self.recipe,
            "--rank",
            "2",
            "--samples-of-text",
            "0",
            *(["--overwrite"] if self.overwrite else []),
        ]
        if self.recipe != "paper":
            text = str(model.parent / "text.txt")
            flags += ["--calibration", text, "--num-calibration-samples", "4", "--max-seq-length", "32"]
        return flags


def write_model(folder: Path, layers: int = 3) -> None:
    """A tiny random Qwen3 in several shards, with the example's tokenizer."""
    vocabulary = json.loads((EXAMPLE / "model" / "config.json").read_text())["vocab_size"]
    config = AutoConfig.for_model(
        "qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(
        folder, max_shard_size="200KB"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / "model" / name, folder)
    text = (EXAMPLE / "text" / "calibration.txt").read_text(encoding="utf-8")
    (folder.parent / "text.txt").write_text(text[:20000], encoding="utf-8")


def digest_of(folder: Path) -> str:
    """One hash of all files of a checkpoint, without times and memory. "absent" where there is none."""
    if not folder.exists():
        return "absent"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes()
        if path.name == "bwla_report.json":
            data = json.dumps({**json.loads(data), "seconds": 0, "memory": 0}).encode()
        elif path.name == "bwla_report.html":  # shows the same data
            continue
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()


def fork_convert(case: Case, options: Options, reason_file: Path, kill_at: int | None = None) -> int:
    """Convert in a fork, which kills itself at its file operation number `kill_at`; returns its process id."""
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
    """Have this process SIGKILL itself when it is about to do its file operation `number`."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_operations(case: Case, options: Options, reason_file: Path) -> int:
    """File operations of a whole conversion."""
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
    """The child's exit code (negative for a signal), or None where it still runs after `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def at_work(out: Path, process: int) -> bool:
    """Whether a process that was started for the output has begun, which its lock tells, or ended."""
    try:
        held = {os.readlink(handle) for handle in Path(f"/proc/{process}/fd").iterdir()}
    except OSError:
        return True
    return not held or str(work_path(out) / "lock") in held


def progress_of(out: Path) -> str:
    """In words, where the work folder says that a killed conversion was."""
    work = work_path(out)
    if not (work / "manifest.json").exists():
        return "no manifest" if work.exists() else "no work folder"
    manifest = json.loads((work / "manifest.json").read_text())
    if manifest["finished"]:
        return "all settled" if (work / "checkpoint").exists() else "renamed"
    return f"{len(manifest['layers'])} layers done" if manifest["source"] else "checking"


class Harness:
    """One run of `kills` kills.

    Args:
        folder: for the models.
        seed: decides all moments.
        turn: recipes that take turns.
    """

    def __init__(self, folder: Path, seed: int, turn: Sequence[str] = RECIPES) -> None:
        self.folder, self.random, self.recipes = folder, random.Random(seed), turn
        self.model = folder / "model"
        self.where: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        write_model(self.model)
        self.expected: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        for recipe in turn:
            self._measure(Case(recipe, overwrite=False))
        self.older = folder / "older"
        self._convert(Case("paper", overwrite=False), self.older, seed=1)
        self.older_digest = digest_of(self.older)

    def _convert(self, case: Case, out: Path, seed: int = 0) -> None:
        code = wait(fork_convert(case, case.options(self.model, out, seed), self.folder / "reason"), None)
        if code != DONE:
            raise SystemExit(f"an undisturbed conversion ended with {code}")

    def _measure(self, case: Case) -> None:
        """Bytes, seconds and file operations of an undisturbed conversion."""
        first, second = self.folder / "first", self.folder / "second"
        started = time.monotonic()
        self._convert(case, first)
        self.seconds[case.recipe] = time.monotonic() - started
        self.expected[case.recipe] = digest_of(first)
        options = case.options(self.model, second)
        self.operations[case.recipe] = count_operations(case, options, self.folder / "reason")
        shutil.rmtree(first)
        shutil.rmtree(second)

    def run(self, kills: int, fresh: int) -> None:
        """Kill and resume until `kills` kills have hit, the last `fresh` of them processes of their own."""
        done, number = 0, 0
        while done < kills:
            own = done >= kills - fresh
            turn = [recipe for recipe in self.recipes if not own or recipe in recipes.RECIPES]
            case = Case(turn[number % len(turn)], overwrite=number // len(turn) % 2 == 1)
            done += self._one(case, number, kills - done, own)
            number += 1
            print(f"{done} kills, {number} conversions, {dict(self.outcomes)}", flush=True)

    def _one(self, case: Case, number: int, most: int, own: bool) -> int:
        """One conversion to its end; returns how often it was killed."""
        out = self.folder / f"out-{number}"
        if case.overwrite:
            shutil.copytree(self.older, out)
        allowed = {self.expected[case.recipe], self.older_digest if case.overwrite else "absent", "absent"}
        killed = 0
        while True:
            code = self._attempt(case, out, resume=killed > 0, kill=killed < most, own=own)
            found = digest_of(out)
            if found not in allowed:
                self.failures.append(f"conversion {number}: the output is half there")
            if code == -signal.SIGKILL:
                killed += 1
                self.where[progress_of(out)] += 1
                continue
            self._judge(code, found == self.expected[case.recipe], number, work_path(out).exists())
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(work_path(out), ignore_errors=True)
            return killed

    def _judge(self, code: int | None, same: bool, number: int, left: bool) -> None:
        if code == REFUSED:
            reason = (self.folder / "reason").read_text()
            self.outcomes[f"refused: {reason}"] += 1
        elif code == DONE and same and not left:
            self.outcomes["the same bytes"] += 1
        else:
            what = (
                "other bytes" if code == DONE and not same else f"exit code {code}, work folder left: {left}"
            )
            self.failures.append(f"conversion {number}: {what}")

    def _attempt(self, case: Case, out: Path, resume: bool, kill: bool, own: bool) -> int | None:
        """Start or resume, and kill if asked to; the exit code."""
        at_operation = not own and self.random.random() < 0.5
        # Early moments of what is left are as good as any: what is finished stays finished.
        last = round(0.7 * self.operations[case.recipe])
        operation = self.random.randint(1, last) if kill and at_operation else None
        seconds = self.random.uniform(0, 0.7 * self.seconds[case.recipe])
        if own:
            child = self._start_process(case, out, resume)
            while not at_work(out, child):
                time.sleep(0.01)
        else:
            options = replace(case.options(self.model, out), resume=resume)
            child = fork_convert(case, options, self.folder / "reason", operation)
        code = wait(child, seconds if kill and not at_operation else None)
        if code is None:
            os.kill(child, signal.SIGKILL)
            code = wait(child, None)
        if own and code == 1:  # how the command line refuses
            (self.folder / "reason").write_text((self.folder / "log").read_text()[-400:])
            return REFUSED
        return code

    def _start_process(self, case: Case, out: Path, resume: bool) -> int:
        code = (
            "from tests.robustness.kill_resume import few_rounds; few_rounds();"
            "from bwla_converter.cli.convert import main; main()"
        )
        command = [sys.executable, "-c", code, str(self.model), str(out), *case.flags(self.model)]
        with (self.folder / "log").open("wb") as log:
            # Waited for by its number, like the forks.
            process = subprocess.Popen(
                [*command, *(["--resume"] if resume else [])],
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
            process.returncode = 0
        return process.pid


def main() -> int:
    """Command line; returns 1 where anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument(
        "--fresh", type=int, default=0, help="of these, in bwla-convert processes of their own"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    torch.set_num_threads(1)  # nor do torch's
    os.environ["OMP_NUM_THREADS"] = "1"
    few_rounds()
    code_version()  # of what is loaded, not of what an editor makes of it meanwhile
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), arguments.seed, arguments.recipes)
        harness.run(arguments.kills, arguments.fresh)
    for failure in harness.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print(f"{arguments.kills} kills, {len(harness.failures)} failures; outcomes: {dict(harness.outcomes)}")
    print(f"killed at: {dict(sorted(harness.where.items()))}")
    if arguments.out:
        write_result(
            arguments.out,
            [{"what": what, "times": times} for what, times in sorted(harness.outcomes.items())],
            kills=arguments.kills,
            seed=arguments.seed,
            failures=harness.failures,
            killed_at=dict(sorted(harness.where.items())),
        )
    return int(bool(harness.failures))


if __name__ == "__main__":
    sys.exit(main())
