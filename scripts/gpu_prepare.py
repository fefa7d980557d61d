"""Prepare the files that scripts/gpu_day.sh and gpu_serve_day.sh need on an isolated H100 or H200.

    python -m scripts.gpu_prepare --python PYTHON3.12 [--serve] [--jobs 2]

Run this on a machine with a package index; it needs no GPU. PYTHON3.12 is an interpreter with the GPU machine's
versions of Python, torch and Triton (3.12, 2.11 or its CPU build, 3.6.0), which compiles Triton's cache. The cache's
keys hash Triton and the kernels' sources, so do not edit kernels/triton afterwards. The results are written to .gpu,
which git ignores:

    whl/            packages that the machine lacks
    cache.tar.xz    compiled kernels (without it, the machine compiles them, a few seconds each)
    bundle/         with --serve: vLLM (build_gpu_bundle.py)
    whl_serve/      with --serve: this project's wheel
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.build_gpu_bundle import BundleError, download
from scripts.gpu_bundle_pins import PACKAGES, PYTHON, TRITON

ROOT = Path(__file__).resolve().parent.parent
PREPARED, WORK = ROOT / ".gpu", ROOT / "build" / "gpu"
LACKING = (
    "compressed-tensors",
    "loguru",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
)
"""Packages that the converter and the plugin import and that the machine may lack."""

MADE = ("whl", "cache.tar.xz", "bundle", "whl_serve")

IMPORTED = {
    "bwla_kernels": "kernels",
    "bwla_converter": "converter",
    "bwla_vllm": "bwla_vllm",
    "benchmarks": "benchmarks",
}
"""Package name -> folder of the repository."""


class PrepareError(Exception):
    """Raised if a step fails; the message says what to do."""


def run(words: Sequence[str | Path], failure: str, **environment: str) -> None:
    """Run a command in the repository's root; raise PrepareError with `failure` if it fails."""
    print("+", *words, flush=True)
    done = subprocess.run(
        [str(word) for word in words], cwd=ROOT, env={**os.environ, **environment}, check=False
    )
    if done.returncode:
        raise PrepareError(failure)


def wheels(folder: Path) -> None:
    """Download the packages that the machine lacks."""
    shutil.rmtree(folder, ignore_errors=True)
    downloaded = download(WORK / "wheels_day", {name: PACKAGES[name] for name in LACKING})
    folder.mkdir(parents=True)
    for path in downloaded:
        shutil.copy(path, folder)


def check_python(python: str) -> None:
    """Raise if the GPU machine could not use the cache of this interpreter."""
    code = "import sys, triton; print(*sys.version_info[:2], triton.__version__, sep='.')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    found, expected = done.stdout.strip() or done.stderr.strip()[-200:], f"{PYTHON}.{TRITON}"
    if found != expected:
        raise PrepareError(
            f"--python {python}: expected Python and Triton {expected}, found {found}: the keys of Triton's cache "
            "depend on both; create such an environment (pip install torch==2.11.0 triton==3.6.0)"
        )


def cache(python: str, what: Sequence[str], jobs: int) -> None:
    """Compile all kernels in `jobs` processes and pack the cache."""
    folder, site = WORK / "cache", WORK / "site"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(site, ignore_errors=True)
    folder.mkdir(parents=True)
    site.mkdir(parents=True)
    for name, source in IMPORTED.items():  # module names are part of the keys
        (site / name).symlink_to(ROOT / source)
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": str(site),
        "PYTHONSAFEPATH": "1",  # the folder `kernels` here would hide Hugging Face's package of that name
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    words = [python, "-m", "benchmarks.kernels.gpu_prebuild", *what, "--part"]
    begun = time.monotonic()
    parts = [subprocess.Popen([*words, f"{part}/{jobs}"], cwd=ROOT, env=environment) for part in range(jobs)]
    statuses = [process.wait() for process in parts]
    print(f"cache: {len(list(folder.iterdir()))} entries in {time.monotonic() - begun:.0f} s", flush=True)
    if any(statuses):
        print("cache: some kernels could not be compiled, see above; the rest is packed", flush=True)
    with tarfile.open(PREPARED / "cache.tar.xz", "w:xz") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, arcname=path.name, filter=_cubins_only)


def _cubins_only(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out the intermediate forms of a kernel, which Triton does not load again."""
    return None if info.name.endswith((".ttir", ".ttgir", ".llir", ".ptx", ".source")) else info


def serving(python: str) -> None:
    """Build vLLM's bundle and this project's wheel."""
    work = WORK / "bundle"
    run(
        [sys.executable, "-m", "scripts.build_gpu_bundle", "--out", work, "--work", WORK / "wheels"],
        "the bundle could not be built, see above",
    )
    for name in ("bundle", "whl_serve"):
        shutil.rmtree(PREPARED / name, ignore_errors=True)
    shutil.copytree(work, PREPARED / "bundle")
    run(
        [python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", PREPARED / "whl_serve", "."],
        "this project's wheel could not be built, see above",
    )


def main() -> int:
    """Run the command line; return 1 if a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", help="interpreter that compiles the cache; without it, no cache is built")
    parser.add_argument("--serve", action="store_true", help="also prepare gpu_serve_day.sh")
    parser.add_argument(
        "--models", default="32b,8b", help="models whose kernels are compiled for serving (32b,8b)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="number of processes that compile (all cores)"
    )
    arguments = parser.parse_args()
    PREPARED.mkdir(exist_ok=True)
    try:
        if arguments.python:
            check_python(arguments.python)
        wheels(PREPARED / "whl")
        if arguments.serve:
            serving(arguments.python or sys.executable)
        if arguments.python:
            what = ["day", *(["serve"] if arguments.serve else []), "--models", arguments.models]
            cache(arguments.python, what, arguments.jobs)
    except (PrepareError, BundleError) as error:
        print(f"gpu_prepare: {error}", file=sys.stderr)
        return 1
    for path in sorted(PREPARED.rglob("*")):
        if path.is_file() and path.relative_to(PREPARED).parts[0] in MADE:
            print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
