"""Measure tokens per second of bf16 and BWLA in vLLM on this machine's CPU, at the shapes of real models.

    python -m benchmarks.serving.serve --models 0.6b,1.7b,8b --out benchmarks/results/serve.json
    python -m benchmarks.serving.serve --models 32b --no-bf16 --batches 1 --out benchmarks/results/serve_32b.json
    python -m benchmarks.serving.serve --models 30b-a3b --no-bf16 --llama-bench llama-build/bin/llama-bench

The weights are random, since speed does not depend on them: vLLM's dummy loader for bf16, a checkpoint written by
`bwla-convert --dummy` for BWLA. Each engine runs in a separate process. Decode is the slope between two answer
lengths, which cancels prefill and start-up; prefill is one long prompt with one answer token.

With `--llama-bench` (llama_cpp.py says how it is built), llama.cpp is timed at the same shapes, with one request, in
the same run: its two speeds are those of its own tool.

Resident memory must not exceed 1.15 times the checkpoint, plus the KV cache, plus vLLM's own memory, which is what the
bf16 engine uses besides its weights and its KV cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import write_result
from benchmarks.serving.engines import COMMON, SHAPES, Job, run_job, write_config
from benchmarks.serving.llama_cpp import SCALES, time_model, write_gguf

PREFILL, ANSWER = 256, 32
KV_BYTES = 320 << 20
"""KV cache of one request of 1,024 tokens at the largest shape, rounded up to whole cache blocks."""
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def job(folder: Path, load_format: str, batches: list[int], eager: bool = False) -> Job:
    """Return the job of an engine, with the same settings for bf16 and BWLA."""
    engine = {
        "enforce_eager": eager,
        "load_format": load_format,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": KV_BYTES * max(batches),
    }
    return Job(str(folder), batches, [PREFILL], batches, engine=engine, environment=ENVIRONMENT)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a config's bfloat16 weights: decoder, embedding and head."""
    config = json.loads((folder / "config.json").read_text())
    hidden, heads, experts = (
        config["hidden_size"],
        config["num_attention_heads"],
        config.get("num_local_experts", 0),
    )
    wide = experts * config["moe_intermediate_size"] if experts else config["intermediate_size"]
    attention = config["head_dim"] * 2 * (heads + config["num_key_value_heads"])
    vocabulary = config["vocab_size"] * (1 if config["tie_word_embeddings"] else 2)
    total: int = 2 * hidden * (config["num_hidden_layers"] * (attention + 3 * wide) + vocabulary)
    return total


def memory_bound(bf16_resident: int, bf16_weights: int, kv: int, checkpoint: int) -> dict[str, int]:
    """Return the KV cache, vLLM's own memory, and the bound of BWLA's resident memory, in bytes."""
    own = bf16_resident - bf16_weights - kv
    return {"kv_bytes": kv, "vllm_own_bytes": own, "bound_bytes": round(1.15 * checkpoint) + kv + own}


def llama_rows(shape: str, bench: Path, kinds: list[str]) -> dict[str, Any]:
    """Time llama.cpp at a model shape; return its speeds and file sizes by the names of the result's row."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for kind in kinds:
            model = Path(work) / f"{kind}.gguf"
            write_gguf(model, {**COMMON, **SHAPES[shape]}, kind)
            found = time_model(bench, model, PREFILL, ANSWER, torch.get_num_threads())
            row |= {f"llama_{kind}_{what}_tok_s": speed for what, speed in found.items()}
            row[f"llama_{kind}_file_bytes"] = model.stat().st_size
            print(
                f"qwen3-{shape} llama.cpp {kind}: decode {found['decode']:.2f} tok/s, "
                f"prefill {found['prefill']:.2f} tok/s",
                flush=True,
            )
            model.unlink()
    return row


def compare(shape: str, batches: list[int], with_bf16: bool, eager: bool = False) -> list[dict[str, Any]]:
    """Measure one model shape in vLLM; return its rows, one for each number of requests."""
    with tempfile.TemporaryDirectory() as work:
        plain, bwla = Path(work) / "plain", Path(work) / "bwla"
        write_config(plain, shape)
        convert = Path(sys.executable).with_name("bwla-convert")
        subprocess.run([convert, plain, bwla, "--dummy", "--lm-head-bits", "8"], check=True)
        size = sum(path.stat().st_size for path in bwla.glob("*.safetensors"))
        ours = run_job(job(bwla, "auto", batches, eager))
        theirs = run_job(job(plain, "dummy", batches, eager)) if with_bf16 else None
        memory = {}
        if theirs is not None:
            kv = KV_BYTES * max(batches)
            memory = memory_bound(theirs["resident_bytes"], weight_bytes(plain), kv, size)
            resident, bound = (value / 1e9 for value in (ours["resident_bytes"], memory["bound_bytes"]))
            print(f"qwen3-{shape}: resident {resident:.2f} GB, bound {bound:.2f} GB", flush=True)
    rows = []
    for batch in batches:
        row: dict[str, Any] = {
            "model": f"qwen3-{shape}",
            "batch": batch,
            "eager": eager,
            "bwla_checkpoint_bytes": size,
            **memory,
        }
        for name, result in (("bwla", ours), ("bf16", theirs)):
            if result is not None:
                row[f"{name}_decode_tok_s"] = result["decode"][str(batch)]
                row[f"{name}_prefill_tok_s"] = result["prefill"][f"{batch}x{PREFILL}"]
                row[f"{name}_resident_bytes"] = result["resident_bytes"]
                row[f"{name}_start_s"] = result["start_s"]
        line = f"{row['model']} batch {batch}: "
        for what in ("decode", "prefill"):
            line += f"{what} {row[f'bwla_{what}_tok_s']:.2f} tok/s"
            if theirs is not None:
                line += f" ({row[f'bwla_{what}_tok_s'] / row[f'bf16_{what}_tok_s']:.2f}x bf16)"
            line += ", " if what == "decode" else ""
        print(line, flush=True)
        rows.append(row)
    return rows


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="0.6b,1.7b", help=f"shapes, of {', '.join(SHAPES)} (0.6b,1.7b)")
    parser.add_argument("--batches", default="1,8", help="numbers of concurrent requests (1,8)")
    parser.add_argument(
        "--no-bf16",
        action="store_true",
        help="measure BWLA only, for shapes that do not fit into memory in bf16",
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the models (--enforce-eager)")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's benchmark tool, to be timed too")
    parser.add_argument(
        "--llama-types",
        default="Q4_0,Q1_0,TQ1_0",
        help=f"types of llama.cpp's weights, of {', '.join(SCALES)} (Q4_0,Q1_0,TQ1_0)",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    kinds = arguments.llama_types.split(",")
    if arguments.llama_bench and not arguments.llama_bench.is_file():
        parser.error(
            f"--llama-bench: expected llama.cpp's benchmark tool, found no file {arguments.llama_bench}"
        )
    if unknown := [kind for kind in kinds if kind not in SCALES]:
        parser.error(f"--llama-types: expected types of {', '.join(SCALES)}, found {', '.join(unknown)}")
    rows = []
    for shape in arguments.models.split(","):
        found = compare(shape, batches, not arguments.no_bf16, arguments.eager)
        if arguments.llama_bench:
            found[0] |= llama_rows(shape, arguments.llama_bench, kinds)
        rows += found
        if arguments.out:
            write_result(arguments.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
