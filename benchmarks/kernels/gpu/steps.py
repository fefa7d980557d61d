"""Run the steps of a day one after another in separate processes, each within its time limit."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.gpu.journal import RESTART, SHORT, Case, Journal, run_cases

RUNNER: tuple[str, ...] = ("-m", "benchmarks.kernels.gpu_day")
MARGIN = 3.0
"""Seconds between the workers' deadline and the step's limit: the last case may exceed the deadline."""

GRACE = 5.0
"""Seconds to wait for a killed worker, which the driver may block, before the next step starts."""

LEAST = 10.0
"""Seconds that must be left to start a step."""


@dataclass(frozen=True)
class Step:
    """A step: its time limit in seconds, and the number of processes that share its cases."""

    name: str
    limit: float
    workers: int = 1


DAY = (
    Step("probe", 40),
    Step("smoke", 130, workers=8),
    Step("chain", 70),
    Step("layer", 150),
    Step("rates", 20),
    Step("tune", 110),
)
"""The steps in order of importance; 520 s in total."""

TOTAL = sum(step.limit for step in DAY)


def cases_of(step: str, on_gpu: bool, journal: Journal, worker: int, workers: int) -> Iterator[Case]:
    """Return the cases of a step; its module, and with it the kernels, is imported only here."""
    from benchmarks.kernels.gpu import chain, layer_table, probe, rates, smoke, tune_day
    from benchmarks.kernels.gpu.shapes import CPU, GPU

    setting = GPU if on_gpu else CPU
    if step == "smoke":
        return smoke.cases(setting, worker, workers)
    if step == "tune":
        return tune_day.cases(setting, journal)
    modules = {"probe": probe, "chain": chain, "layer": layer_table, "rates": rates}
    return modules[step].cases(setting)  # type: ignore[no-any-return]


def work(step: str, on_gpu: bool, journal: Journal, worker: int, workers: int, begun: Path) -> int:
    """Run a worker's share of a step's cases; return the exit status."""
    from benchmarks.kernels.gpu import tune_day
    from benchmarks.kernels.gpu.layers import device_is_lost
    from benchmarks.kernels.gpu.shapes import CPU, GPU

    setting = GPU if on_gpu else CPU
    found = cases_of(step, on_gpu, journal, worker, workers)
    status = run_cases(journal, step, found, lambda: device_is_lost(setting.device), begun)
    if step == "tune" and status != RESTART:
        tune_day.write_table(setting, journal, journal.folder / "tuning.json")
    return status


@dataclass(frozen=True)
class Day:
    """Runs the steps.

    Attributes:
        journal: the journal of the results, with the deadline.
        on_gpu: whether to run on the GPU, else with tiny sizes in Triton's interpreter.
        environment: further environment variables of the workers.
    """

    journal: Journal
    on_gpu: bool
    environment: Mapping[str, str]

    def run(self, steps: Sequence[Step]) -> None:
        """Run as many steps as the time allows."""
        for step in steps:
            left = self.journal.left()
            if left < LEAST:
                print(f"== {step.name}: no time left", flush=True)
                self.journal.note(step.name, {"left_out": "the whole step: no time left"})
                continue
            limit = min(step.limit, left)
            print(f"== {step.name} (at most {limit:.0f} s of {left:.0f} s left)", flush=True)
            begun = time.monotonic()
            self._run_step(step, time.time() + limit)
            rows = [row for row in self.journal.rows(step.name) if "case" in row]
            bad = [row["case"] for row in rows if not row.get("ok", True)]
            seconds = time.monotonic() - begun
            print(f"== {step.name}: {len(rows)} cases, {len(bad)} bad, {seconds:.0f} s", flush=True)

    def _run_step(self, step: Step, end: float) -> None:
        count = step.workers if self.on_gpu else 1
        with tempfile.TemporaryDirectory() as folder:
            marks = [Path(folder) / str(worker) for worker in range(count)]
            threads = [
                threading.Thread(target=self._supervise, args=(step, worker, count, end, mark))
                for worker, mark in enumerate(marks)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _supervise(self, step: Step, worker: int, count: int, end: float, mark: Path) -> None:
        """Run a worker, and start it again whenever it dies, until its cases or the time are over."""
        words = [sys.executable, *RUNNER, step.name, "--worker", f"{worker}/{count}", "--mark", str(mark)]
        words += ["--out", str(self.journal.folder), "--until", str(end - MARGIN)]
        words += [] if self.on_gpu else ["--cpu"]
        while True:
            mark.unlink(missing_ok=True)
            process = subprocess.Popen(words, env={**os.environ, **self.environment})
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.time()))
            status = process.poll()
            if status is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            if status in (0, SHORT):
                return
            case = mark.read_text(encoding="utf-8") if mark.exists() else ""
            why = "did not end in time" if status is None else f"ended its process with status {status}"
            finished = case in self.journal.done(step.name)
            if case and not finished:
                self.journal.note(step.name, {"case": case, "ok": False, "error": why})
            elif status != RESTART or not case:
                self.journal.note(step.name, {"failure": f"worker {worker}: {why}", "after": case})
            if status is None or not case or end - time.time() < LEAST:
                return
