"""Time llama.cpp and vLLM on the same file of one-bit or ternary weights, imported by bwla-convert.

    python -m benchmarks.serving.imported --models 1.7b --types Q1_0 --llama-bench llama-build/bin/llama-bench \\
        --out benchmarks/results/imported_serve.json

The weights are random, in groups with scales of their own; head and embedding have the type of the linears, as in
Bonsai's files. llama.cpp's speeds are those of its own tool (llama_cpp.py says how it is built), vLLM's are measured as
in serve.py, with the same numbers of tokens and threads, one engine after the other.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bwla_converter.source.gguf_path import CACHE_VARIABLE

from benchmarks.common.record import write_result
from benchmarks.serving.engines import COMMON, SHAPES, convert, name_of, run_job
from benchmarks.serving.llama_cpp import time_model, write_gguf
from benchmarks.serving.serve import ANSWER, PREFILL, figures, job

TYPES = ("Q1_0", "TQ1_0")
"""Types of which any bytes are weights of two or three values; random ones of TQ2_0 have four."""


def compare(shape: str, kind: str, bench: Path, work: Path) -> dict[str, Any]:
    """Return a row: both engines' speeds on one file, with one request, and vLLM's with eight."""
    file, out = work / f"{shape}-{kind}.gguf", work / f"{shape}-{kind}"
    write_gguf(file, {**COMMON, **SHAPES[shape]}, kind, kind)
    row: dict[str, Any] = {"model": name_of(shape), "type": kind, "file_bytes": file.stat().st_size}
    theirs = time_model(bench, file, PREFILL, ANSWER, torch.get_num_threads())
    row |= {f"llama_{what}_tok_s": speed for what, speed in theirs.items()}
    convert(file, out, "--recipe", "lossless", "--no-report")
    row["checkpoint_bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    ours = run_job(job(out, "auto", [1, 8]))
    row |= figures("bwla", ours, 1, long=False)
    row["bwla_decode_8_tok_s"] = ours["decode"]["8"]
    for what in ("decode", "prefill"):
        row[f"{what}_ratio"] = row[f"bwla_{what}_tok_s"] / row[f"llama_{what}_tok_s"]
    return row


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default="1.7b", help=f"shapes, of {', '.join(SHAPES)} (1.7b)")
    add("--types", default="Q1_0", help=f"types of the weights, of {', '.join(TYPES)} (Q1_0)")
    add("--llama-bench", type=Path, required=True, help="llama.cpp's benchmark tool")
    add("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    rows = []
    for shape in arguments.models.split(","):
        for kind in arguments.types.split(","):
            with tempfile.TemporaryDirectory() as folder:
                os.environ[CACHE_VARIABLE] = str(Path(folder) / "cache")
                rows.append(compare(shape, kind, arguments.llama_bench, Path(folder)))
            print(rows[-1], flush=True)
            if arguments.out is not None:
                write_result(arguments.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
