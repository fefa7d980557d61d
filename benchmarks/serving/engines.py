"""Time a vLLM engine in a separate process, so that engines do not affect each other.

python -m benchmarks.serving.engines JOB.json ANSWER.json      (serve.py and gpu_serve.py call this)
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

_EXPERTS = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "tie_word_embeddings": True},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
             "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "tie_word_embeddings": False},
    "32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
            "tie_word_embeddings": False},
    "30b-a3b": {**_EXPERTS, "num_hidden_layers": 48},
    "30b-a3b-4-layers": {**_EXPERTS, "num_hidden_layers": 4},
}  # fmt: skip
"""Published sizes of Qwen3 and Qwen2.5 (0.5b), and a mixture of experts with fewer layers, which fits in bf16."""

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}

COMMON = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
}
SLOW_SECONDS = 15.0
"""A prompt that takes longer than this is timed only once."""


@dataclass(frozen=True)
class Job:
    """An engine to start, and what to time.

    Attributes:
        folder: folder of a model, or of a config alone.
        batches: numbers of concurrent requests for decode.
        prefills: prompt lengths for prefill.
        prefill_batches: numbers of concurrent requests for prefill of the first length; the others have one.
        contexts: tokens of context before the answer of one request, for decode at length; the context is computed
            once, and found in the cache of prefixes afterwards.
        repeats: repetitions of each measurement, of which the median is taken.
        engine: further arguments of `vllm.LLM`.
        environment: further environment variables of the process.
        long_answer: difference in tokens of the two answers whose difference in time gives the decode speed.
    """

    folder: str
    batches: list[int]
    prefills: list[int]
    prefill_batches: list[int] = field(default_factory=lambda: [1])
    contexts: list[int] = field(default_factory=list)
    repeats: int = 3
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    long_answer: int = 32


def name_of(shape: str) -> str:
    """Return the name of a shape in results: qwen3-8b, for example."""
    return f"{'qwen2.5' if SHAPES[shape].get('model_type') == 'qwen2' else 'qwen3'}-{shape}"


def write_config(folder: Path, shape: str) -> None:
    """Write a folder that contains only the config.json of one of `SHAPES`."""
    from transformers import AutoConfig

    settings = {**COMMON, **SHAPES[shape]}
    architecture = ARCHITECTURES[settings["model_type"]]
    config = AutoConfig.for_model(**settings, architectures=[architecture], dtype="bfloat16")
    config.save_pretrained(folder)


def convert(source: Path, out: Path, *options: str | Path) -> None:
    """Run bwla-convert."""
    command = Path(sys.executable).with_name("bwla-convert")
    subprocess.run([command, source, out, *options], check=True)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(job: Job) -> dict[str, Any]:
    """Start the engine in this process and time it.

    Returns: `decode` {batch: tokens/s}, `decode_at` {context: tokens/s}, `prefill` {"batch x length": tokens/s},
        `start_s`, `first_answer_s` since the process started, `resident_bytes`.
    """
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    engine = LLM(
        job.folder,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_num_seqs=max(job.batches + job.prefill_batches),
        enable_prefix_caching=bool(job.contexts),
        disable_log_stats=True,
        **job.engine,
    )
    start_s = time.perf_counter() - started
    engine.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=1), use_tqdm=False)
    first_answer_s = time.time() - psutil.Process().create_time()

    asked = itertools.count(2)

    def seconds(batch: int, prompt: int, answer: int, cached: bool = False) -> float:
        # No prompt begins as an earlier one does, unless its keys and values are to be found in the cache.
        first = 1 if cached else next(asked)
        options = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [first, *((7 * i + 13 * b) % 5000 + 10 for i in range(1, prompt))]}
            for b in range(batch)
        ]
        begun = time.perf_counter()
        engine.generate(prompts, options, use_tqdm=False)
        return time.perf_counter() - begun

    def speed(batch: int, context: int, cached: bool = False) -> float:
        seconds(batch, context, 4, cached)
        slopes = [
            seconds(batch, context, 8 + job.long_answer, cached) - seconds(batch, context, 8, cached)
            for _ in range(job.repeats)
        ]
        return batch * job.long_answer / statistics.median(slopes)

    decode = {str(batch): speed(batch, 16) for batch in job.batches}
    decode_at = {str(context): speed(1, context, cached=True) for context in job.contexts}
    prefill = {}
    for batch in job.prefill_batches:
        for length in job.prefills if batch == 1 else job.prefills[:1]:
            times = [seconds(batch, length, 1)]
            if times[0] < SLOW_SECONDS:  # for slow prompts the overhead of the first call does not matter
                times = [seconds(batch, length, 1) for _ in range(job.repeats)]
            prefill[f"{batch}x{length}"] = batch * length / statistics.median(times)
    return {
        "decode": decode,
        "decode_at": decode_at,
        "prefill": prefill,
        "start_s": start_s,
        "first_answer_s": first_answer_s,
        "resident_bytes": resident_bytes(),
    }


def run_job(job: Job, timeout: float | None = None) -> dict[str, Any]:
    """Run `measure` in a separate process.

    Raises:
        RuntimeError: the engine failed; the message ends with the last lines of its output.
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        question.write_text(json.dumps(asdict(job)))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving.engines", question, answer],
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **job.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout,
        )
        if done.returncode or not answer.exists():
            raise RuntimeError(f"the engine of {job.folder} failed:\n{done.stdout[-3000:]}")
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(measure(Job(**json.loads(Path(sys.argv[1]).read_text())))))
