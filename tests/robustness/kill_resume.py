"""Kill conversions with SIGKILL at random moments, resume them, and compare the result with an undisturbed conversion.

    python -m tests.robustness.kill_resume --kills 100 --out benchmarks/results/kill_resume.json

Half of the kills come after a random time. The other half hit a random file operation: the process counts its own
opens, renames and removals and kills itself at the chosen one, because random times rarely hit the short moments in
which something on disk changes. Every second conversion replaces an older checkpoint. After each kill the output must
be absent, the older checkpoint, or the complete new one; each resumed conversion must produce the same bytes (only
time and memory in the report may differ) or refuse with a reason.

Conversions run in forks of this process, since loading torch and transformers takes longer than converting; with
`--fresh N` the last N kills hit `bwla-convert` processes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from bwla_converter.resume.fingerprint import code_version
from bwla_converter.resume.work_folder import work_path

from benchmarks.common.record import ROOT, write_result
from tests.robustness.conversions import (
    DONE,
    RECIPES,
    REFUSED,
    Case,
    count_operations,
    digest_of,
    few_rounds,
    fork_convert,
    wait,
    write_example,
)


def at_work(out: Path, process: int) -> bool:
    """Return whether a process that converts to `out` holds its lock, or has ended."""
    try:
        open_files = {os.readlink(handle) for handle in Path(f"/proc/{process}/fd").iterdir()}
    except OSError:
        return True
    return not open_files or str(work_path(out) / "lock") in open_files


def progress_of(out: Path) -> str:
    """Describe the state of a killed conversion by its work folder."""
    work = work_path(out)
    if not (work / "manifest.json").exists():
        return "no manifest" if work.exists() else "no work folder"
    manifest = json.loads((work / "manifest.json").read_text())
    if manifest["finished"]:
        return "complete" if (work / "checkpoint").exists() else "renamed"
    return f"{len(manifest['layers'])} layers done" if manifest["source"] else "checking"


class Harness:
    """Kills and resumes conversions, and records the outcomes.

    Args:
        folder: folder for the models.
        seed: seed of the moments of the kills.
        turn: recipes that take turns.
    """

    def __init__(self, folder: Path, seed: int, turn: Sequence[str] = RECIPES) -> None:
        self.folder, self.random, self.recipes = folder, random.Random(seed), turn
        self.model = folder / "model"
        self.where: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        write_example(self.model)
        self.expected: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        for recipe in turn:
            self._measure(Case(recipe, overwrite=False))
        self.older = folder / "older"
        self._convert(Case("data-free", overwrite=False), self.older, seed=1)
        self.older_digest = digest_of(self.older)

    def _convert(self, case: Case, out: Path, seed: int = 0) -> None:
        code = wait(fork_convert(case, case.options(self.model, out, seed), self.folder / "reason"), None)
        if code != DONE:
            raise SystemExit(f"an undisturbed conversion ended with {code}")

    def _measure(self, case: Case) -> None:
        """Record the bytes, seconds and file operations of an undisturbed conversion."""
        first, second = self.folder / "first", self.folder / "second"
        started = time.monotonic()
        self._convert(case, first)
        self.seconds[case.recipe] = time.monotonic() - started
        self.expected[case.recipe] = digest_of(first)
        options = case.options(self.model, second)
        self.operations[case.recipe] = count_operations(options)
        shutil.rmtree(first)
        shutil.rmtree(second)

    def run(self, kills: int, fresh: int) -> None:
        """Kill and resume until `kills` processes have been killed; the last `fresh` are `bwla-convert` processes."""
        done, number = 0, 0
        while done < kills:
            own = done >= kills - fresh
            turn = [recipe for recipe in self.recipes if not own or recipe in RECIPES[:2]]
            case = Case(turn[number % len(turn)], overwrite=number // len(turn) % 2 == 1)
            done += self._one(case, number, kills - done, own)
            number += 1
            print(f"{done} kills, {number} conversions, {dict(self.outcomes)}", flush=True)

    def _one(self, case: Case, number: int, most: int, own: bool) -> int:
        """Run one conversion to its end; return how often it was killed."""
        out = self.folder / f"out-{number}"
        if case.overwrite:
            shutil.copytree(self.older, out)
        allowed = {self.expected[case.recipe], self.older_digest if case.overwrite else "absent", "absent"}
        killed = 0
        while True:
            code = self._attempt(case, out, resume=killed > 0, kill=killed < most, own=own)
            digest = digest_of(out)
            if digest not in allowed:
                self.failures.append(f"conversion {number}: the output is incomplete")
            if code == -signal.SIGKILL:
                killed += 1
                self.where[progress_of(out)] += 1
                continue
            self._judge(code, digest == self.expected[case.recipe], number, work_path(out).exists())
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
        """Start or resume a conversion, kill it if `kill`; return the exit code."""
        at_operation = not own and self.random.random() < 0.5
        # Finished layers stay finished, so every part of the conversion is reached by kills early in a resumed one.
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
        if own and code == 1:  # the command line's exit code for an error
            (self.folder / "reason").write_text((self.folder / "log").read_text()[-400:])
            return REFUSED
        return code

    def _start_process(self, case: Case, out: Path, resume: bool) -> int:
        code = (
            "from tests.robustness.conversions import few_rounds; few_rounds();"
            "from bwla_converter.cli.convert import main; main()"
        )
        command = [sys.executable, "-c", code, str(self.model), str(out), *case.flags(self.model)]
        with (self.folder / "log").open("wb") as log:
            # `wait` reaps it by its process id, as it does the forks.
            process = subprocess.Popen(
                [*command, *(["--resume"] if resume else [])],
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
            process.returncode = 0
        return process.pid


def main() -> int:
    """Run the command line; return 1 if any conversion failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="number of kills (100)")
    parser.add_argument(
        "--fresh",
        type=int,
        default=0,
        help="how many of the kills hit bwla-convert processes instead of forks (0)",
    )
    parser.add_argument(
        "--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="recipes that take turns (all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills (0)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    few_rounds()
    code_version()  # cached now: the sources may be edited during a long run
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
