"""A GPU's first minutes: is it right, how fast is it, what should the table say; in steps that do not need each other.

    python -m benchmarks.kernels.gpu_day [STEP ...] [--out DIR] [--seconds N] [--cpu]

Steps: probe, smoke, chain, layer, rates, tune (all, in this order). Each leaves DIR/STEP.jsonl, `tune` also
DIR/tuning.json; `gpu_report.py DIR` reads them. Needs torch, Triton and bwla_kernels. On an isolated machine
`scripts/gpu_day.sh` runs it. --cpu runs everything tiny in Triton's interpreter.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.kernels.gpu.journal import Journal
from benchmarks.kernels.gpu.steps import DAY, TOTAL, Day, work


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 whatever the results say, they are read from the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in DAY]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)} (all)")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder of results"
    )
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"time for everything ({TOTAL:.0f})")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes in Triton's interpreter")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--mark", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(names):
        parser.error(f"expected steps of {', '.join(names)}, found {', '.join(sorted(unknown))}")
    if options.worker:
        worker, workers = (int(part) for part in options.worker.split("/"))
        journal = Journal(options.out, options.until)
        return work(options.steps[0], not options.cpu, journal, worker, workers, options.mark)
    environment = {"PYTHONUNBUFFERED": "1"}
    if options.cpu:  # TRITON_INTERPRET=0 from outside: no kernel can run, which the tests use
        environment["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    day = Day(Journal(options.out, time.time() + options.seconds), not options.cpu, environment)
    day.run([step for step in DAY if step.name in (options.steps or names)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
