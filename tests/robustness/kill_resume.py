"""Kill conversions with SIGKILL at random moments, resume them, and compare the result with an undisturbed conversion.

    python -m tests.robustness.kill_resume --kills 120 --out benchmarks/results/kill_resume.json

Half of the kills come after a random time. The other half hit a random file operation: the process counts its own
opens, renames and removals and kills itself at the chosen one, because random times rarely hit the short moments in
which something on disk changes. Each conversion has a cache of its own; until it keeps the sensitivities there, many of
the operations are chosen among those in the cache. Every second conversion of a kind replaces an older checkpoint.

After each kill the output must be absent, the older checkpoint, or the complete new one; each resumed conversion must
produce the same bytes (only time and memory in the report may differ) or refuse with a reason.

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
from bwla_converter.common.atomic_files import PARTIAL
from bwla_converter.resume.fingerprint import code_version
from bwla_converter.resume.work_folder import work_path
from bwla_converter.source.gguf_path import CACHE_VARIABLE

from benchmarks.common.record import ROOT, write_result
from tests.robustness.conversions import (
    DONE,
    KINDS,
    REFUSED,
    Case,
    Moment,
    cache_path,
    count_operations,
    few_rounds,
    fork_convert,
    hashes_of,
    wait,
    write_models,
)

CACHE_OPERATIONS = 12
"""File operations in the cache until the sensitivities are kept, about."""

CACHE_SHARE = 0.7
"""Share of the kills at file operations for which only those in the cache are counted, until sensitivities are kept."""

LATE_SHARE = 0.5
"""Share of the attempts that are killed where all layers are finished, the longest part of so small a conversion."""


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
    for path in partly_written(out):
        return f"{path.parent.name} partly written"
    if not (work / "manifest.json").exists():
        return "no manifest" if work.exists() else "no work folder"
    manifest = json.loads((work / "manifest.json").read_text())
    if manifest["finished"]:
        return "complete" if (work / "checkpoint").exists() else "renamed"
    return f"{len(manifest['layers'])} layers done" if manifest["source"] else "checking"


def partly_written(out: Path) -> list[Path]:
    """Return the files in the cache of a conversion that were not written to their end."""
    return sorted(cache_path(out).rglob(f"*{PARTIAL}"))


class Harness:
    """Kills and resumes conversions, and records the outcomes.

    Args:
        folder: folder for the models.
        seed: seed of the moments of the kills.
        kinds: names of the kinds of conversions that take turns.
    """

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str]) -> None:
        self.folder, self.random, self.kinds = folder, random.Random(seed), kinds
        self.where: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        write_models(folder)
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        for name in kinds:
            self._measure(Case(name, overwrite=False))
        self.older = folder / "older"
        self._convert(Case("data-free", overwrite=False), self.older, seed=1)
        self.older_hashes = hashes_of(self.older)

    def _convert(self, case: Case, out: Path, seed: int = 0) -> None:
        code = wait(fork_convert(case, case.options(self.folder, out, seed), self.folder / "reason"), None)
        if code != DONE:
            raise SystemExit(f"an undisturbed conversion ended with {code}")

    def _measure(self, case: Case) -> None:
        """Record the bytes, seconds and file operations of an undisturbed conversion."""
        first, second = self.folder / "first", self.folder / "second"
        started = time.monotonic()
        self._convert(case, first)
        self.seconds[case.name] = time.monotonic() - started
        self.expected[case.name] = hashes_of(first)
        self.operations[case.name] = count_operations(case, case.options(self.folder, second))
        if hashes_of(second) != self.expected[case.name]:
            raise SystemExit(f"{case.name}: two undisturbed conversions differ")
        remove(first)
        remove(second)

    def run(self, kills: int, fresh: int) -> None:
        """Kill and resume until `kills` processes have been killed; the last `fresh` are `bwla-convert` processes."""
        done, number = 0, 0
        while done < kills:
            own = done >= kills - fresh
            turn = [name for name in self.kinds if not own or not KINDS[name].touched_up]
            case = Case(turn[number % len(turn)], overwrite=number // len(turn) % 2 == 1)
            done += self._one(case, number, kills - done, own)
            number += 1
            print(f"{done} kills, {number} conversions, {len(self.failures)} failures", flush=True)

    def _one(self, case: Case, number: int, most: int, own: bool) -> int:
        """Run one conversion to its end; return how often it was killed."""
        out = self.folder / f"out-{number}"
        if case.overwrite:
            shutil.copytree(self.older, out)
        allowed = [self.expected[case.name], {}, *([self.older_hashes] if case.overwrite else [])]
        killed = 0
        while True:
            late = progress_of(out) == "complete" and self.random.random() > LATE_SHARE
            code = self._attempt(case, out, resume=killed > 0, kill=killed < most and not late, own=own)
            hashes = hashes_of(out)
            if code == -signal.SIGKILL:
                if hashes not in allowed:
                    self.failures.append(f"{out.name} ({case.name}): the output is incomplete")
                killed += 1
                self.kills[case.name] += 1
                self.where[progress_of(out)] += 1
                continue
            self._judge(case, code, hashes, out)
            remove(out)
            return killed

    def _judge(self, case: Case, code: int | None, hashes: dict[str, str], out: Path) -> None:
        """Record how a conversion ended: with an exit code and files of certain hashes."""
        left = work_path(out).exists() or bool(partly_written(out))
        other = sorted(name for name, _ in hashes.items() ^ self.expected[case.name].items())
        if code == REFUSED:
            reason = (self.folder / "reason").read_text()
            self.outcomes[case.name, f"refused: {reason}"] += 1
        elif code == DONE and not other and not left:
            self.outcomes[case.name, "the same bytes"] += 1
        elif code == DONE and other:
            self.failures.append(
                f"{out.name} ({case.name}): other bytes in {', '.join(dict.fromkeys(other))}"
            )
        else:
            self.failures.append(f"{out.name} ({case.name}): exit code {code}, unfinished files left: {left}")

    def _attempt(self, case: Case, out: Path, resume: bool, kill: bool, own: bool) -> int | None:
        """Start or resume a conversion, kill it if `kill`; return the exit code."""
        at_operation = kill and not own and self.random.random() < 0.5
        seconds = self.random.uniform(0, 0.7 * self.seconds[case.name])
        if own:
            child = self._start_process(case, out, resume)
            while not at_work(out, child):
                time.sleep(0.01)
        else:
            options = replace(case.options(self.folder, out), resume=resume)
            moment = self._moment(case, out) if at_operation else None
            child = fork_convert(case, options, self.folder / "reason", moment)
        code = wait(child, seconds if kill and not at_operation else None)
        if code is None:
            os.kill(child, signal.SIGKILL)
            code = wait(child, None)
        if own and code == 1:  # the command line's exit code for an error
            (self.folder / "reason").write_text((self.folder / "log").read_text()[-400:])
            return REFUSED
        return code

    def _moment(self, case: Case, out: Path) -> Moment:
        """Return a random file operation."""
        measures = case.kind.calibration(self.folder) and not any(cache_path(out).rglob("*.json"))
        if measures and self.random.random() < CACHE_SHARE:
            return Moment(self.random.randint(1, CACHE_OPERATIONS), cache_path(out))
        # Finished layers stay finished, so every part of the conversion is reached by kills early in a resumed one.
        return Moment(self.random.randint(1, round(0.7 * self.operations[case.name])))

    def _start_process(self, case: Case, out: Path, resume: bool) -> int:
        code = (
            "from tests.robustness.conversions import few_rounds; few_rounds();"
            "from bwla_converter.cli.convert import main; main()"
        )
        command = [sys.executable, "-c", code, *case.arguments(self.folder, out)]
        with (self.folder / "log").open("wb") as log:
            # `wait` reaps it by its process id, as it does the forks.
            process = subprocess.Popen(
                [*command, *(["--resume"] if resume else [])],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, CACHE_VARIABLE: str(cache_path(out))},
            )
            process.returncode = 0
        return process.pid


def remove(out: Path) -> None:
    """Remove a checkpoint, and the work folder and the cache of its conversion."""
    for path in (out, work_path(out), cache_path(out)):
        shutil.rmtree(path, ignore_errors=True)


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
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="kinds of conversions that take turns (all)",
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
        harness = Harness(Path(folder), arguments.seed, arguments.kinds)
        harness.run(arguments.kills, arguments.fresh)
    for failure in harness.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    rows = [
        {"kind": name, "kills": harness.kills[name], "what": what, "times": times}
        for (name, what), times in sorted(harness.outcomes.items())
    ]
    for row in rows:
        print(row)
    print(f"{arguments.kills} kills, {len(harness.failures)} failures")
    print(f"killed at: {dict(sorted(harness.where.items()))}")
    if arguments.out:
        write_result(
            arguments.out,
            rows,
            kills=arguments.kills,
            seed=arguments.seed,
            failures=harness.failures,
            killed_at=dict(sorted(harness.where.items())),
        )
    return int(bool(harness.failures))


if __name__ == "__main__":
    sys.exit(main())
