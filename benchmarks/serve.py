"""Tokens per second in vLLM on this machine's CPU: bf16 against BWLA at the shapes of real models.

    python benchmarks/serve.py --models 0.6b,1.7b --out benchmarks/results/serve.json

Weights are random (speed does not depend on them): vLLM's dummy loader for bf16, a checkpoint written by
`bwla-convert --dummy` for BWLA. Each engine runs in a process of its own; decode is the slope between two
answer lengths, so that prefill and start-up cancel; prefill is one long prompt with one answer token.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import write_result

SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "tie_word_embeddings": True},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
             "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
           "tie_word_embeddings": False},
    "32b": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
            "tie_word_embeddings": False},
}  # fmt: skip
"""Qwen3's published sizes."""

COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 4096}
SHORT, LONG, PREFILL, REPEATS = 8, 40, 512, 3


def write_config(folder: Path, shape: str) -> None:
    """A folder with the config.json of one of `SHAPES`, and nothing else."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "qwen3", architectures=["Qwen3ForCausalLM"], dtype="bfloat16", **COMMON, **SHAPES[shape]
    )
    config.save_pretrained(folder)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, load_format: str, batches: list[int]) -> dict[str, Any]:
    """Start an engine in this process and time it; runs in the worker."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder),
        load_format=load_format,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=max(batches),
        kv_cache_memory_bytes=1024 * 160 * max(batches) * 1024,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def seconds(batch: int, prompt: int, answer: int) -> float:
        options = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": [(7 * i + 13 * b) % 5000 + 10 for i in range(prompt)]} for b in range(batch)
        ]
        started = time.perf_counter()
        engine.generate(prompts, options, use_tqdm=False)
        return time.perf_counter() - started

    seconds(1, 16, 4)
    result: dict[str, Any] = {"resident_bytes": resident_bytes(), "decode": {}, "prefill": {}}
    for batch in batches:
        slopes = [seconds(batch, 16, LONG) - seconds(batch, 16, SHORT) for _ in range(REPEATS)]
        result["decode"][batch] = batch * (LONG - SHORT) / statistics.median(slopes)
        result["prefill"][batch] = (
            batch * PREFILL / statistics.median(seconds(batch, PREFILL, 1) for _ in range(REPEATS))
        )
    return result


def run_worker(folder: Path, load_format: str, batches: list[int]) -> dict[str, Any]:
    """Measure in a process of its own, so that nothing of one engine is left for the next."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        words = [sys.executable, __file__, "--worker", str(folder), load_format, answer.name]
        words += ["--batches", ",".join(map(str, batches))]
        subprocess.run(
            words, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        result: dict[str, Any] = json.loads(answer.read())
        return result


def compare(shape: str, batches: list[int], with_bf16: bool) -> list[dict[str, Any]]:
    """All rows of one model shape."""
    with tempfile.TemporaryDirectory() as work:
        plain, bwla = Path(work) / "plain", Path(work) / "bwla"
        write_config(plain, shape)
        convert = Path(sys.executable).with_name("bwla-convert")
        subprocess.run([convert, plain, bwla, "--dummy", "--lm-head-bits", "8"], check=True)
        size = sum(path.stat().st_size for path in bwla.glob("*.safetensors"))
        ours = run_worker(bwla, "auto", batches)
        theirs = run_worker(plain, "dummy", batches) if with_bf16 else None
    rows = []
    for batch in batches:
        row = {
            "model": f"qwen3-{shape}",
            "batch": batch,
            "bwla_decode_tok_s": ours["decode"][str(batch)],
            "bwla_prefill_tok_s": ours["prefill"][str(batch)],
            "bwla_checkpoint_bytes": size,
            "bwla_resident_bytes": ours["resident_bytes"],
        }
        line = f"{row['model']} batch {batch}: decode {row['bwla_decode_tok_s']:.2f} tok/s"
        if theirs is not None:
            row["bf16_decode_tok_s"] = theirs["decode"][str(batch)]
            row["bf16_prefill_tok_s"] = theirs["prefill"][str(batch)]
            row["bf16_resident_bytes"] = theirs["resident_bytes"]
            line += f" ({row['bwla_decode_tok_s'] / row['bf16_decode_tok_s']:.2f}x bf16)"
            line += f", prefill {row['bwla_prefill_tok_s']:.0f} tok/s"
            line += f" ({row['bwla_prefill_tok_s'] / row['bf16_prefill_tok_s']:.2f}x bf16)"
        print(line, flush=True)
        rows.append(row)
    return rows


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="0.6b,1.7b", help=f"shapes, of {', '.join(SHAPES)} (0.6b,1.7b)")
    parser.add_argument("--batches", default="1,8", help="requests at a time (1,8)")
    parser.add_argument(
        "--no-bf16", action="store_true", help="BWLA alone, for shapes that do not fit in bf16"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    if arguments.worker:
        folder, load_format, answer = arguments.worker
        Path(answer).write_text(json.dumps(measure(Path(folder), load_format, batches)))
        return 0
    rows = []
    for shape in arguments.models.split(","):
        rows += compare(shape, batches, not arguments.no_bf16)
    if arguments.out:
        write_result(arguments.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
