"""Serve many concurrent clients with vLLM and check every answer.

    python -m benchmarks.serving.load --out benchmarks/results/load.json
    python -m benchmarks.serving.load --models FOLDER --requests 200

`vllm serve` runs with its default settings (prefix caching, chunked prefill, --max-num-seqs) and serves one model after
the other:

- `example`: the example, converted to one bit a weight;
- `planes`: the example in two planes a weight;
- `lora`: `example` with four LoRA adapters, of which three fit in a batch; requests ask for one of them or for none;
- `experts`: a mixture of experts in one bit, with random weights;
- `dummy`: random weights of Qwen3-0.6B's shape.

32 OpenAI clients send 1,000 requests to each: complete and streamed, short and long, some cancelled half-way, some
malformed. Each prompt is also sent alone, before and after, if there are adapters to each of them. If an answer under
load differs from the answer alone, it is scored alone: the largest gap in log probability between a token of the
answer and the most likely token (rounding ties, see tests/vllm/test_example.py), compared with the same gap for answers
to other prompts, and for answers of other adapters to the same prompt.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from openai import AsyncOpenAI

from benchmarks.common.record import ROOT, write_result
from benchmarks.common.server import Server, serve
from benchmarks.serving.load_judge import judge
from benchmarks.serving.load_models import MODELS, make_model
from benchmarks.serving.load_requests import (
    MALFORMED,
    Answer,
    Prompt,
    Request,
    make_plan,
    make_pool,
    send,
    send_malformed,
    with_adapters,
)

TEXT = ROOT / "examples" / "text" / "heldout.txt"
TEMPLATE = ROOT / "examples" / "clients" / "plain_chat.jinja"
SAMPLE_SECONDS = 1.0
START_SECONDS = 1800
"""Generous, because a slow start on a busy machine is not a failure of what is tested."""


def resident_bytes(pid: int) -> dict[str, int]:
    """Return the resident memory of a process and its descendants, by name."""
    found: dict[str, int] = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found[process.name()] = found.get(process.name(), 0) + process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


def memory_facts(samples: list[tuple[int, dict[str, int]]], requests: int) -> dict[str, Any]:
    """Summarize samples of (finished requests, bytes by process); the first fifth of the run is warm-up."""
    steady = [sample for sample in samples if sample[0] >= 0.2 * requests]
    late = [sample for sample in samples if sample[0] >= 0.6 * requests]
    first, last = steady[0][1], steady[-1][1]

    def rise(part: list[tuple[int, dict[str, int]]]) -> float:
        return round(slope([(float(done), float(sum(sizes.values()))) for done, sizes in part]), 1)

    return {
        "memory_bytes": {"first": sum(samples[0][1].values()), "last": sum(last.values())},
        "grown_bytes_by_process": {name: size - first.get(name, 0) for name, size in last.items()},
        "memory_slope_bytes_per_request": rise(steady),
        "memory_slope_of_the_last_two_fifths": rise(late),
    }


def slope(points: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of y over x."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return statistics.linear_regression(xs, ys).slope


def metrics(server: Server) -> dict[str, float]:
    """Return vLLM's Prometheus metrics, summed over labels."""
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        match = re.fullmatch(r"(vllm:\w+)(?:\{[^}]*\})? (\S+)", line)
        if match:
            found[match[1]] = found.get(match[1], 0.0) + float(match[2])
    return found


async def alone(server: Server, pool: list[Prompt]) -> list[Answer]:
    """Send every prompt of the pool, one after the other."""
    async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        return [await send(client, server.model, prompt, "whole") for prompt in pool]


async def together(
    server: Server, pool: list[Prompt], plan: list[Request], clients: int
) -> tuple[list[Answer], list[tuple[int, dict[str, int]]]]:
    """Send the plan's requests from `clients` concurrent clients; also return the memory over time."""
    answers: list[Answer | None] = [None] * len(plan)
    waiting = iter(range(len(plan)))
    memory: list[tuple[int, dict[str, int]]] = []

    async def work() -> None:
        async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
            for number in waiting:
                request = plan[number]
                if request.kind == "malformed":
                    model = pool[number % len(pool)].adapter or server.model
                    answers[number] = await send_malformed(client, model, request.index)
                else:
                    answers[number] = await send(client, server.model, pool[request.index], request.kind)

    async def watch() -> None:
        while True:
            done = sum(answer is not None for answer in answers)
            memory.append((done, resident_bytes(server.pid)))
            await asyncio.sleep(SAMPLE_SECONDS)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(work() for _ in range(clients)))
    watcher.cancel()
    return [answer if answer is not None else Answer(0, error="never sent") for answer in answers], memory


def quantile(values: list[float], share: float) -> float:
    """Return the value that a share of the values does not exceed."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def times(answers: list[Answer], plan: list[Request]) -> dict[str, Any]:
    """Return p50 and p99 of the well-formed requests that were not cancelled."""
    good = [a for a, r in zip(answers, plan, strict=True) if r.kind in ("whole", "stream") and not a.error]
    first = [answer.first for answer in good if answer.first is not None]
    return {
        "latency_s": {
            "p50": quantile([a.seconds for a in good], 0.5),
            "p99": quantile([a.seconds for a in good], 0.99),
        },
        "first_token_s": {"p50": quantile(first, 0.5), "p99": quantile(first, 0.99)},
        "answer_tokens": sum(len(answer.tokens) for answer in answers),
        "prompt_tokens": sum(len(answer.prompt_tokens) for answer in answers),
    }


async def run(
    server: Server, name: str, adapters: tuple[str, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """Run the whole test on one served model; return its row."""
    size = options.prompts // (1 + len(adapters))
    prompts = make_pool(TEXT.read_text(encoding="utf-8"), size, options.longest, options.seed)
    pool = with_adapters(prompts, adapters)
    plan = make_plan(options.requests, len(pool), options.seed)
    before = await alone(server, pool)
    started = time.perf_counter()
    answers, memory = await together(server, pool, plan, options.clients)
    seconds = time.perf_counter() - started
    await asyncio.sleep(2)  # the engine notices a closed stream at its next step
    after_load = metrics(server)
    after = await alone(server, pool)
    failed = [a.error for a in answers if a.error] + [a.error for a in (*before, *after) if a.error]
    kinds = {kind: sum(r.kind == kind for r in plan) for kind in ("whole", "stream", "cancel", "malformed")}
    return {
        "model": name,
        "requests": len(plan),
        "clients": options.clients,
        "kinds": kinds,
        "malformed_cases": [case[0] for case in MALFORMED],
        "failed": len(failed),
        "failures": failed[:5],
        "seconds": round(seconds, 1),
        **times(answers, plan),
        "distinct_answers_alone": len({tuple(answer.tokens) for answer in before}),
        "prompts": len(prompts),
        "adapters": len(adapters),
        "alone_again_identical": sum(a.tokens == b.tokens for a, b in zip(before, after, strict=True)),
        **await judge(server, pool, plan, answers, before),
        "left_running": after_load.get("vllm:num_requests_running", -1.0)
        + after_load.get("vllm:num_requests_waiting", 0.0),
        "prefix_cache_hit_tokens": after_load.get("vllm:prefix_cache_hits_total", 0.0),
        **memory_facts(memory, len(plan)),
    }


def passed(row: dict[str, Any]) -> bool:
    """Return whether no answer was lost, cut short or given to the wrong request, and no request is left running."""
    controls = ["prompts", "adapters"] if row["adapters"] else ["prompts"]
    separated = all(
        row["largest_gap_of_rescored_nats"] < row[f"smallest_gap_of_wrong_{control}_nats"]
        for control in controls
    )
    wrong_answers = row["failed"] + row["mixed_up"] + row["cut_short"]
    return not wrong_answers and separated and row["left_running"] == 0 and row["alive"]


def run_model(name: str, work: Path, flags: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Make a model in the folder `work`, serve it and test it; return its row."""
    served = make_model(name, work)
    log = options.log or work / "server.log"
    with serve(served.folder, log, [*flags, *served.flags], health_seconds=START_SECONDS) as server:
        row = asyncio.run(run(server, name, served.adapters, options))
        row["alive"] = psutil.Process(server.pid).is_running() and bool(asyncio.run(alone_once(server)))
    row["serve_flags"] = [flag.replace(f"{work}/", "") for flag in served.flags]
    row["ok"] = passed(row)
    return row


def main() -> int:
    """Run the command line; return 1 if an answer was lost or wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ",".join(MODELS)
    parser.add_argument("--models", default=names, help=f"some of these, or folders ({names})")
    parser.add_argument("--requests", type=int, default=1000, help="number of requests (1000)")
    parser.add_argument("--clients", type=int, default=32, help="number of concurrent clients (32)")
    parser.add_argument(
        "--prompts",
        type=int,
        default=80,
        help="number of different prompts; one to each adapter counts as one (80)",
    )
    parser.add_argument("--longest", type=int, default=250, help="words of the longest prompt (250)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and of their order (0)")
    parser.add_argument("--serve", default="", help="further arguments of vllm serve, as one string")
    parser.add_argument("--log", type=Path, help="file for the output of the last server")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    flags = ["--quantization", "bwla", "--chat-template", str(TEMPLATE), *options.serve.split()]
    rows = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as work:
            rows.append(run_model(name, Path(work), flags, options))
        print(json.dumps(rows[-1], indent=1), flush=True)
        if options.out:
            shown = [flag.removeprefix(f"{ROOT}/") for flag in flags]
            write_result(options.out, rows, serve_flags=shown, cores=len(os.sched_getaffinity(0)))
    return 0 if all(row["ok"] for row in rows) else 1


async def alone_once(server: Server) -> list[int]:
    """Send one more prompt; return the tokens of the answer."""
    (answer,) = await alone(server, [Prompt("The end", False, 4)])
    return answer.tokens


if __name__ == "__main__":
    sys.exit(main())
