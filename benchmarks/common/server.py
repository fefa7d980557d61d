"""`vllm serve` as a context manager: start on a free loopback port, wait for health, end with nothing left."""

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
"""A small KV cache, and nothing asked of the network."""


class ServerError(Exception):
    """The server did not start; the message ends with its last lines."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: base of the OpenAI-compatible API, ends in /v1.
        model: the name that requests must give.
        log: file with everything that the server printed.
        pid: of the server's first process, whose children are the others.
    """

    url: str
    model: str
    log: Path
    pid: int


def free_port() -> int:
    """A loopback port that nobody listens on now."""
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
    """End the server's whole process group: engine and workers outlive a parent that is merely killed."""
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
    """Serve a checkpoint for the length of a with-block.

    Args:
        model: the checkpoint's folder, also the name to ask for.
        log: where the server's output goes.
        arguments: further arguments of `vllm serve`.
        environment: variables beside those of this process and `CPU_ENVIRONMENT`.
        health_seconds: how long the server may take to start.

    Raises:
        ServerError: the server ended, or was not healthy in time.
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
