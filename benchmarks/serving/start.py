"""Measure the time from starting a vLLM process to its first answer, on this machine's CPU, at the shape of a model.

    python -m benchmarks.serving.start --models 0.5b,0.6b --out benchmarks/results/start.json

Each kind of engine is started twice with an empty cache of compiled graphs: the first start compiles, the second can
read what the first one compiled.

- `eager`: vLLM does not compile (--enforce-eager);
- `aot`: vLLM compiles ahead of time, its default, which it cannot load again on a CPU;
- `default`: what the plugin chooses, see bwla_vllm/compat/compile_cache.py.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common.record import write_result
from benchmarks.serving.engines import SHAPES, convert, name_of, run_job, write_config
from benchmarks.serving.serve import job

KINDS: dict[str, dict[str, str]] = {"eager": {}, "aot": {"VLLM_USE_AOT_COMPILE": "1"}, "default": {}}
"""Kinds of engines, and what their environment has for it."""


def starts(folder: Path, shape: str, kind: str) -> list[dict[str, Any]]:
    """Start an engine of a kind twice; return a row for each start."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        caches = {"VLLM_CACHE_ROOT": f"{cache}/vllm", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        question = job(folder, "auto", [1], eager=kind == "eager")
        question = replace(question, repeats=1, environment={**question.environment, **caches, **KINDS[kind]})
        for number in (1, 2):
            answer = run_job(question)
            rows.append(
                {
                    "model": name_of(shape),
                    "engine": kind,
                    "start": number,
                    "first_answer_s": round(answer["first_answer_s"], 1),
                }
            )
            print(f"{shape} {kind}, start {number}: {rows[-1]['first_answer_s']} s", flush=True)
    return rows


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="0.6b", help=f"shapes, of {', '.join(SHAPES)} (0.6b)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"({','.join(KINDS)})")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.models.split(","):
        with tempfile.TemporaryDirectory() as work:
            plain, bwla = Path(work) / "plain", Path(work) / "bwla"
            write_config(plain, shape)
            convert(plain, bwla, "--dummy", "--lm-head-bits", "8")
            for kind in arguments.kinds.split(","):
                rows += starts(bwla, shape, kind)
                if arguments.out:
                    write_result(arguments.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
