"""Benchmarks that run in processes of their own: ours, and other libraries in environments of their own."""

import argparse
import json
import os
import subprocess
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.record import ROOT

PEER_SCRIPT = ROOT / "benchmarks" / "conversion" / "peers.py"


class RunError(Exception):
    """Raised if a process fails; the message is the last line that it printed."""


def run(command: Sequence[str | Path], result: Path, threads: int, folder: Path) -> dict[str, Any]:
    """Run a command that writes the JSON file `result`, and return its contents.

    Args:
        command: the command.
        result: the file.
        threads: threads that it may use.
        folder: where it runs.

    Raises:
        RunError: it failed.
    """
    count = str(threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # Libraries are compiled once, not in every process.
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode or not result.is_file():
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise RunError(f"exit status {done.returncode}: {lines[-1] if lines else 'no output'}")
    measured: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return measured


def peer_command(
    python: Path, method: str, model: Path, samples: Path, result: Path, settings: tuple[int, int, int]
) -> list[str | Path]:
    """Return the command that runs peers.py.

    Args:
        python: the Python of the library's environment.
        method: a name in `benchmarks.conversion.peers.PEERS`.
        model: folder of the model.
        samples: safetensors file with the calibration samples "ids" [S, T], and the "windows" [W, T] that perplexity is
            measured on if it is wanted.
        result: the JSON file to write.
        settings: bits, group size and threads.
    """
    numbers = [str(number) for number in settings]
    # -P keeps the script's folder out of the import path, where our modules could hide the library's.
    return [python, "-P", PEER_SCRIPT, result, method, model.resolve(), samples, *numbers]


def add_method_options(parser: argparse.ArgumentParser, methods: Iterable[str]) -> None:
    """Add --methods and --peer-python to a command line; `choose_methods` reads them."""
    parser.add_argument("--methods", help=f"{', '.join(methods)}, joined by commas (those that can run)")
    parser.add_argument("--peer-python", action="append", default=[], metavar="METHOD=PYTHON")


def choose_methods(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    ours: Sequence[str],
    peers: Collection[str],
) -> None:
    """Replace `arguments.methods` by a list, and set `arguments.pythons`, which maps other libraries to their Python.

    Args:
        parser: reports a method that does not exist, and one without a Python, and exits.
        arguments: the command line, with what `add_method_options` added.
        ours: methods that run in this environment.
        peers: methods that need --peer-python.
    """
    pairs = [text.partition("=") for text in arguments.peer_python]
    arguments.pythons = {method: Path(python).absolute() for method, _, python in pairs}
    can_run = (*ours, *arguments.pythons)
    arguments.methods = arguments.methods.split(",") if arguments.methods else list(can_run)
    if unknown := {*arguments.methods, *arguments.pythons} - {*ours, *peers}:
        expected = ", ".join((*ours, *peers))
        parser.error(f"expected {expected} as a method, found {', '.join(sorted(unknown))}")
    if missing := {*arguments.methods} - {*can_run}:
        parser.error(f"expected --peer-python METHOD=PYTHON for {', '.join(sorted(missing))}, found none")
