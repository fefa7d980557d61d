"""Measure tokens per second of bf16 and BWLA in vLLM on this machine's CPU, at the shapes of real models.

    python -m benchmarks.serving.serve --models 0.6b,1.7b,8b --out benchmarks/results/serve.json
    python -m benchmarks.serving.serve --models 32b --no-bf16 --batches 1 --out benchmarks/results/serve_32b.json
    python -m benchmarks.serving.serve --models 30b-a3b --no-bf16 --llama-bench llama-build/bin/llama-bench

The weights are random, since speed does not depend on them: vLLM's dummy loader for bf16, a checkpoint written by
`bwla-convert --dummy` for BWLA. Each engine runs in a separate process. Decode is the slope between two answer
lengths, which cancels prefill and start-up; prefill is one long prompt with one answer token.

With `--long`, one request is also timed with a prompt of 2,048 tokens, and behind contexts of 1,024 and 4,096.

With `--llama-bench` (llama_cpp.py says how it is built), llama.cpp is timed at the same shapes, with one request, in
the same run: its two speeds are those of its own tool.

Resident memory must not exceed 1.15 times the checkpoint, plus the KV cache, plus vLLM's own memory, which is what the
bf16 engine uses besides its weights and its KV cache.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import write_result
from benchmarks.serving.engines import COMMON, SHAPES, Job, convert, name_of, run_job, write_config
from benchmarks.serving.llama_cpp import SCALES, time_model, write_gguf

PREFILL, ANSWER = 256, 32
LONG_PREFILL, CONTEXTS = 2048, [1024, 4096]
KV_BYTES = 320 << 20
"""KV cache of one request of 1,024 tokens at the largest shape, rounded up to whole cache blocks."""
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def job(folder: Path, load_format: str, batches: list[int], eager: bool = False, long: bool = False) -> Job:
    """Return the job of an engine, with the same settings for bf16 and BWLA."""
    engine = {
        "enforce_eager": eager,
        "load_format": load_format,
        "max_model_len": 4224 if long else 1024,
        "kv_cache_memory_bytes": kv_bytes(batches, long),
    }
    prefills = [PREFILL, LONG_PREFILL] if long else [PREFILL]
    contexts = CONTEXTS if long else []
    return Job(str(folder), batches, prefills, batches, contexts, engine=engine, environment=ENVIRONMENT)


def kv_bytes(batches: list[int], long: bool) -> int:
    """Return the bytes of the KV cache of an engine."""
    return KV_BYTES * max(*batches, 5 if long else 1)


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


def llama_rows(shape: str, bench: Path, kinds: list[str], long: bool) -> dict[str, Any]:
    """Time llama.cpp at a model shape; return its speeds and file sizes by the names of the result's row."""
    lengths: dict[str, Any] = {"long_prefill": LONG_PREFILL, "contexts": CONTEXTS} if long else {}
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for kind in kinds:
            model = Path(work) / f"{kind}.gguf"
            write_gguf(model, {**COMMON, **SHAPES[shape]}, kind)
            found = time_model(bench, model, PREFILL, ANSWER, torch.get_num_threads(), **lengths)
            row |= {f"llama_{kind}_{what}_tok_s": speed for what, speed in found.items()}
            row[f"llama_{kind}_file_bytes"] = model.stat().st_size
            print(
                f"{name_of(shape)} llama.cpp {kind}: "
                + ", ".join(f"{what} {speed:.2f} tok/s" for what, speed in found.items()),
                flush=True,
            )
            model.unlink()
    return row


@dataclass(frozen=True)
class Plan:
    """What to measure of each shape.

    Attributes:
        batches: numbers of concurrent requests.
        head_bits: bits of BWLA's heads, each of which is an engine.
        with_bf16: whether the unquantized model is measured too.
        eager: whether vLLM compiles the models.
        long: whether long prompts and contexts are timed too.
    """

    batches: list[int]
    head_bits: list[int]
    with_bf16: bool = True
    eager: bool = False
    long: bool = False


def compare(shape: str, plan: Plan) -> list[dict[str, Any]]:
    """Measure one model shape in vLLM; return its rows, one for each head and number of requests."""
    batches, rows = plan.batches, []
    with tempfile.TemporaryDirectory() as work:
        plain = Path(work) / "plain"
        write_config(plain, shape)
        theirs = None
        if plan.with_bf16:
            theirs = run_job(job(plain, "dummy", batches, plan.eager, plan.long))
        for bits in plan.head_bits:
            bwla = Path(work) / f"bwla-{bits}"
            convert(plain, bwla, "--dummy", "--lm-head-bits", str(bits))
            size = sum(path.stat().st_size for path in bwla.glob("*.safetensors"))
            ours = run_job(job(bwla, "auto", batches, plan.eager, plan.long))
            facts: dict[str, Any] = {
                "model": name_of(shape),
                "head_bits": bits,
                "eager": plan.eager,
                "bwla_checkpoint_bytes": size,
            }
            if theirs is not None:
                kv = kv_bytes(batches, plan.long)
                facts |= memory_bound(theirs["resident_bytes"], weight_bytes(plain), kv, size)
                resident, bound = (value / 1e9 for value in (ours["resident_bytes"], facts["bound_bytes"]))
                print(f"{name_of(shape)}: resident {resident:.2f} GB, bound {bound:.2f} GB", flush=True)
            for batch in batches:
                row = {**facts, "batch": batch}
                for engine, result in (("bwla", ours), ("bf16", theirs)):
                    if result is not None:
                        row |= figures(engine, result, batch, plan.long and batch == 1)
                print(describe(row), flush=True)
                rows.append(row)
    return rows


def figures(engine: str, result: dict[str, Any], batch: int, long: bool) -> dict[str, Any]:
    """Return an engine's figures by the names that a row has for them."""
    row = {
        f"{engine}_decode_tok_s": result["decode"][str(batch)],
        f"{engine}_prefill_tok_s": result["prefill"][f"{batch}x{PREFILL}"],
        f"{engine}_resident_bytes": result["resident_bytes"],
        f"{engine}_start_s": result["start_s"],
    }
    if long:
        row[f"{engine}_prefill_{LONG_PREFILL}_tok_s"] = result["prefill"][f"1x{LONG_PREFILL}"]
        row |= {f"{engine}_decode_{context}_tok_s": speed for context, speed in result["decode_at"].items()}
    return row


def describe(row: dict[str, Any]) -> str:
    """Return a line about a row: BWLA's speeds, and how many times bf16's they are."""
    parts = []
    for key in row:
        what = key.removeprefix("bwla_").removesuffix("_tok_s")
        if key == f"bwla_{what}_tok_s":
            bf16 = row.get(f"bf16_{what}_tok_s")
            ratio = "" if bf16 is None else f" ({row[key] / bf16:.2f}x bf16)"
            parts.append(f"{what} {row[key]:.2f} tok/s{ratio}")
    return f"{row['model']}, head {row['head_bits']}, batch {row['batch']}: " + ", ".join(parts)


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
    parser.add_argument("--lm-head-bits", default="8", help="bits of BWLA's head, one or several (8)")
    parser.add_argument("--long", action="store_true", help="also time long prompts and contexts")
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
    heads = [int(bits) for bits in arguments.lm_head_bits.split(",")]
    plan = Plan(batches, heads, not arguments.no_bf16, arguments.eager, arguments.long)
    if arguments.llama_bench and not arguments.llama_bench.is_file():
        parser.error(
            f"--llama-bench: expected llama.cpp's benchmark tool, found no file {arguments.llama_bench}"
        )
    if unknown := [kind for kind in kinds if kind not in SCALES]:
        parser.error(f"--llama-types: expected types of {', '.join(SCALES)}, found {', '.join(unknown)}")
    rows = []
    for shape in arguments.models.split(","):
        found = compare(shape, plan)
        if arguments.llama_bench:
            theirs = llama_rows(shape, arguments.llama_bench, kinds, plan.long)
            found = [row | theirs if row["batch"] == batches[0] else row for row in found]
        rows += found
        if arguments.out:
            write_result(arguments.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
