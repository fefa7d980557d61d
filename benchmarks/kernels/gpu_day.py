"""Check, time and tune the kernels on a GPU within nine minutes, in independent steps.

    python -m benchmarks.kernels.gpu_day [STEP ...] [--out DIR] [--seconds N] [--cpu]

The steps are probe, smoke, chain, layer, rates and tune (default: all, in this order). Each writes DIR/STEP.jsonl,
`tune` also DIR/tuning.json; `gpu_report.py DIR` reads them. Needs torch, Triton and bwla_kernels. On an isolated
machine `scripts/gpu_day.sh` runs it. --cpu runs everything with tiny sizes in Triton's interpreter.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.kernels.gpu.journal import Journal
from benchmarks.kernels.gpu.steps import DAY, TOTAL, Day, work


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 0 whatever the results are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in DAY]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)} (all)")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder for the results"
    )
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"time for everything ({TOTAL:.0f})")
    parser.add_argument("--cpu", action="store_true", help="run tiny sizes in Triton's interpreter")
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
    if options.cpu:  # the tests set TRITON_INTERPRET=0, with which no kernel can run
        environment["TRITON_INTERPRET"] = os.environ.get("TRITON_INTERPRET", "1")
    options.out.mkdir(parents=True, exist_ok=True)
    day = Day(Journal(options.out, time.time() + options.seconds), not options.cpu, environment)
    day.run([step for step in DAY if step.name in (options.steps or names)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
