"""`vllm serve` as a context manager: starts on a free loopback port, waits for health, stops all processes."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HEALTH_SECONDS = 300
STOP_SECONDS = 30

CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""A small KV cache, and no network access."""


class ServerError(Exception):
    """Raised if the server does not start; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: base URL of the OpenAI-compatible API, ends with /v1.
        model: model name for requests.
        log: file with the server's output.
        pid: id of the server's parent process.
    """

    url: str
    model: str
    log: Path
    pid: int


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _healthy(root: str) -> bool:
    try:
        with urllib.request.urlopen(f"{root}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server's process group; killing the parent alone would leave the engine and workers running."""
    for step in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, step)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
    process.wait()


@contextmanager
def serve(
    model: Path,
    log: Path,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    health_seconds: float = HEALTH_SECONDS,
) -> Iterator[Server]:
    """Serve a checkpoint while the body of the with statement runs.

    Args:
        model: folder of the checkpoint, also the model name for requests.
        log: file for the server's output.
        arguments: further arguments of `vllm serve`.
        environment: environment variables besides those of this process and `CPU_ENVIRONMENT`.
        health_seconds: seconds that the server may take to start.

    Raises:
        ServerError: the server ended, or was not healthy within `health_seconds`.
    """
    port = free_port()
    root = f"http://127.0.0.1:{port}"
    command = [
        Path(sys.executable).with_name("vllm"),
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in (*command, *arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**CPU_ENVIRONMENT, **os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + health_seconds
        while not _healthy(root):
            if process.poll() is not None or time.monotonic() > deadline:
                ended = process.poll() is not None
                state = "ended" if ended else f"was not healthy within {health_seconds:g} s"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                raise ServerError(f"vllm serve {state}; its last lines (all in {log}):\n{tail}")
            time.sleep(0.2)
        yield Server(f"{root}/v1", str(model), log, process.pid)
    finally:
        _stop(process)
