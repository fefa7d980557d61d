"""Measure tokens per second in vLLM on a GPU at the shapes of Qwen3 models: bf16, int4 (Marlin), fp8 and BWLA.

    python -m benchmarks.serving.gpu_serve --out benchmarks/results/gpu_serve.json

Weights are random and never written: every engine starts from a config.json with vLLM's dummy loader, in a separate
process. Decode is the slope between two answer lengths at batch 1, 8 and 64; prefill is one prompt of 1K or 4K tokens
with one answer token. Methods that fail, give an impossible figure or do not fit into --minutes are listed in the
result, which is written after every method. The text of the answers has no meaning; BWLA's layers check their kernels
when they are loaded, and gpu_day.py checks them in full.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common.record import write_result
from benchmarks.serving.engines import SHAPES, Job, run_job, write_config

METHODS = ("bwla", "bf16", "int4", "fp8")
BATCHES, PREFILLS, ANSWER = [1, 8, 64], [1024, 4096], 128
INT4 = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
}
"""Quantization config of GPTQ, which vLLM serves with Marlin."""


def write_method(folder: Path, shape: str, method: str) -> dict[str, Any]:
    """Write the config.json of a method; return the engine's further arguments."""
    write_config(folder, shape)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if method == "bwla":
        from bwla_converter.checkpoint.dummy import plan_dummy
        from bwla_converter.checkpoint.layout import output_config
        from bwla_converter.options import Options

        source, plan = plan_dummy(Options(str(folder), folder / "out", head_bits=8))
        config = output_config(source, plan, None)
    elif method == "int4":
        config["quantization_config"] = INT4
    path.write_text(json.dumps(config))
    return {"quantization": "fp8"} if method == "fp8" else {}


def measure(shape: str, method: str, attention: str | None, timeout: float) -> dict[str, float]:
    """Return the tokens per second of a method: `decode_1`, ..., `prefill_4096`.

    Raises:
        RuntimeError, subprocess.TimeoutExpired: as `engines.run_job`, or a figure is not positive.
    """
    with tempfile.TemporaryDirectory() as work:
        engine = {
            **write_method(Path(work), shape, method),
            "load_format": "dummy",
            "max_model_len": max(PREFILLS) + 64,
            "compilation_config": {"cudagraph_capture_sizes": BATCHES},
            **({"attention_backend": attention} if attention else {}),
        }
        result = run_job(Job(work, BATCHES, PREFILLS, repeats=2, engine=engine, long_answer=ANSWER), timeout)
    speeds = {f"decode_{batch}": result["decode"][str(batch)] for batch in BATCHES}
    speeds |= {f"prefill_{length}": result["prefill"][f"1x{length}"] for length in PREFILLS}
    if invalid := {key: speed for key, speed in speeds.items() if not 0 < speed < math.inf}:
        raise RuntimeError(f"expected longer answers to take longer, found these speeds: {invalid}")
    return speeds


def to_rows(shape: str, found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return a row for each kind of work, with a key for each method's tokens/s."""
    kinds = [("decode", batch, 16) for batch in BATCHES] + [("prefill", 1, length) for length in PREFILLS]
    rows = []
    for kind, batch, length in kinds:
        key = f"decode_{batch}" if kind == "decode" else f"prefill_{length}"
        speeds = {f"{method}_tok_s": speed[key] for method, speed in found.items()}
        rows.append({"model": f"qwen3-{shape}", "kind": kind, "batch": batch, "prompt": length, **speeds})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, with BWLA's ratio to each other method."""
    table = Table(title="tokens per second (BWLA's ratio)")
    for heading in ("model", "work", *METHODS):
        table.add_column(heading, justify="right")
    for row in rows:
        work = f"{row['kind']} {row['batch']} x {row['prompt']}"
        ours, cells = row.get("bwla_tok_s"), []
        for method in METHODS:
            speed = row.get(f"{method}_tok_s")
            ratio = f" ({ours / speed:.2f}x)" if speed and ours and method != "bwla" else ""
            cells.append(f"{speed:.1f}{ratio}" if speed else "not run")
        table.add_row(row["model"], work, *cells)
    Console(width=120).print(table)


def main() -> int:
    """Run the command line; return 1 if BWLA could not be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="32b,8b", help=f"shapes, of {', '.join(SHAPES)} (32b,8b)")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (all)")
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything (9.5)")
    parser.add_argument("--attention-backend", help="vLLM's attention backend (vLLM's own choice)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    end, problems = time.monotonic() + 60 * arguments.minutes, []
    speeds: dict[str, dict[str, dict[str, float]]] = {}
    for shape in arguments.models.split(","):
        found = speeds.setdefault(shape, {})
        for method in arguments.methods.split(","):
            left = end - time.monotonic()
            try:
                if left < 30:
                    raise TimeoutError("no time left")
                found[method] = measure(shape, method, arguments.attention_backend, left)
                print(f"{shape} {method}: {found[method]}", flush=True)
            except Exception as error:  # the other engines must run whatever this one raises
                problems.append(f"{shape} {method}: not measured: {type(error).__name__}: {error}")
                print(problems[-1], flush=True)
            rows = [row for name, methods in speeds.items() for row in to_rows(name, methods)]
            if arguments.out:
                write_result(arguments.out, rows, not_measured=problems)
    show(rows)
    return 0 if all("bwla_tok_s" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
