"""Build Triton's compile cache for an H100 or H200 on a machine without one, into TRITON_CACHE_DIR.

    python -m benchmarks.kernels.gpu_prebuild day serve [--part 0/2]     (scripts/gpu_prepare.py runs it)
    python -m benchmarks.kernels.gpu_prebuild relocate                   (after the cache was moved)

`day` compiles the kernels that gpu_day.py launches, `serve` those that vLLM compiles when it starts. Triton and Python
must have the GPU machine's versions, since they are part of the keys.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path


def main() -> int:
    """Run the command line; return 1 if a kernel could not be compiled."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=("day", "serve", "relocate"), help="what to compile")
    parser.add_argument("--models", default="32b,8b", help="models to serve (32b,8b)")
    parser.add_argument("--part", default="0/1", help="I/N: this process's share of the work (0/1)")
    arguments = parser.parse_args()
    if "TRITON_CACHE_DIR" not in os.environ:
        parser.error("TRITON_CACHE_DIR is not set: set it to the cache's folder")
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    if "relocate" in arguments.what:
        from benchmarks.kernels.gpu.cache import relocate

        print(f"cache: {relocate(folder)} kernels in {folder}", flush=True)
        return 0
    from benchmarks.kernels.gpu.prebuild import day_jobs, describe, serve_jobs, stand_in

    stand_in()
    part, parts = (int(number) for number in arguments.part.split("/"))
    jobs = list(day_jobs()) if "day" in arguments.what else []
    jobs += serve_jobs(tuple(arguments.models.split(","))) if "serve" in arguments.what else []
    failed = 0
    for name, job in jobs[part::parts]:
        begun = time.monotonic()
        try:
            job()
        except Exception:  # a kernel that fails must not prevent the others
            failed += 1
            print(f"{name}: FAILED\n{traceback.format_exc()[-1500:]}", flush=True)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    describe(folder, subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip())
    print(f"part {part} of {parts}: {len(jobs[part::parts])} jobs, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
