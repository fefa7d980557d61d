"""Write the tables of README.md and docs/ that repeat what is known elsewhere.

    python -m scripts.docs_tables            # write them
    python -m scripts.docs_tables --check    # exit with 1 if a document is not up to date

A table stands between `<!-- table: KIND RESULTS; scripts/docs_tables.py -->` and `<!-- end of table -->`. RESULTS names
files in benchmarks/results without `.json`, joined by `+`. The kind `families` reads the converter's list instead.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bwla_converter.source.families import family_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BEGIN = "<!-- table: "
MARKED = re.compile(
    r"(<!-- table: (\w+) ?(\S*); scripts/docs_tables.py -->\n).*?(\n<!-- end of table -->)", re.S
)

ABITS = (16, 8, 6, 4)
METHODS = {
    "rtn": "round to nearest, 1 bit",
    "gptq": "GPTQ, 1 bit",
    "gptq, equal bits": "GPTQ, equal bits",
    "hadamard+gptq": "Hadamard rotation + GPTQ",
    "billm": "BiLLM (our implementation)",
    "data-free": "`data-free`",
    "paper": "`paper`",
    "fast": "`fast`",
    "best": "`best`",
}
RENAMED = "2026-11-29T12:00:00+00:00"
"""Until then, results call the recipe `data-free` "paper"."""

CONVERSION_PEERS = {
    "llmcompressor-gptq": "GPTQ, 4 bits (llm-compressor)",
    "gptqmodel-gptq": "GPTQ, 4 bits (GPTQModel)",
    "autoround-light": "AutoRound light, 4 bits",
}
FRONTIER_METHODS = {
    "data-free": "`data-free`",
    "paper": "`paper`",
    "fast": "`fast`",
    "best": "`best`",
    "llmcompressor-gptq": "GPTQ (llm-compressor), symmetric",
    "llmcompressor-gptq-asym": "GPTQ (llm-compressor), zero points",
    "autoround-light": "AutoRound light",
    "hqq": "HQQ",
}
ABLATIONS = {
    "best, 8 distillation epochs": "`best` with `--distill-epochs 8`",
    "best": "`best`",
    "best, signs not distilled": "`best`, signs frozen during distillation",
    "best, no distillation": "`best` without distillation",
    "best, no tuning": "`best` without layer-wise tuning",
    "fast": "`fast`",
    "fast, last norm as it was": "`fast` without fitting the final norm",
    "fast, no column scales": "`fast` without column scales",
    "fast, no PSP": "`fast` without the low-rank correction",
    "fast, random rotation": "`fast` with a random rotation instead of OKT",
    "fast, no coordinate descent": "`fast` without coordinate descent",
    "fast, no error feedback": "`fast` without error feedback and coordinate descent",
    "fast, original target": "`fast` without compensating the error of earlier layers",
    "data-free": "`data-free`",
    "data-free, rank 0": "`data-free` without the low-rank correction",
}

Rows = list[dict[str, Any]]


def read_result(name: str) -> dict[str, Any]:
    """Read a result file by its name without `.json`. Recipes have their present names."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if isinstance(result["rows"], list) and result.get("date", RENAMED) < RENAMED:
        for row in result["rows"]:
            if "method" in row:
                row["method"] = re.sub("^paper", "data-free", row["method"])
    return result


def read_rows(names: str) -> Rows:
    """Read the rows of quality results, each with the number of calibration samples of its file."""
    return [
        {**row, "samples": result["samples"]}
        for result in map(read_result, names.split("+"))
        for row in result["rows"]
    ]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def mean_loss(rows: Rows, abits: int) -> str:
    """Format mean and standard deviation of d over the seeds, at `abits` activation bits."""
    losses = [row["d"] for row in rows if row["abits"] == abits]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.3f}{spread}"


def quality_table(names: str) -> str:
    """One line per method, one column per number of activation bits."""
    rows, lines = read_rows(names), []
    for method, title in METHODS.items():
        if runs := [row for row in rows if row["method"] == method]:
            seeds = len({row["seed"] for row in runs})
            losses = [mean_loss(runs, abits) for abits in ABITS]
            lines.append([title, f"{runs[0]['bits_per_weight']:.2f}", *losses, str(seeds)])
    header = ["method", "bits per weight", "d, 16-bit activations", "8-bit", "6-bit", "4-bit", "seeds"]
    return markdown_table(header, lines)


def ablation_table(names: str) -> str:
    """One line per recipe with a part left out or changed, at 6-bit activations."""
    rows, lines = read_rows(names), []
    for method, title in ABLATIONS.items():
        runs = [row for row in rows if row["method"] == method]
        seeds = len({row["seed"] for row in runs})
        lines.append([title, f"{runs[0]['bits_per_weight']:.2f}", mean_loss(runs, 6), str(seeds)])
    return markdown_table(["recipe", "bits per weight", "d", "seeds"], lines)


def amounts_table(names: str) -> str:
    """One line per amount of calibration data, at 6-bit activations; seed 0, which every amount was measured with."""
    rows, lines = read_rows(names), []
    losses = {(r["samples"], r["method"]): r["d"] for r in rows if r["abits"] == 6 and r["seed"] == 0}
    methods = ("gptq", "gptq, equal bits", "fast", "best")
    for samples in sorted({row["samples"] for row in rows}):
        values = [losses.get((samples, method)) for method in methods]
        lines.append([f"{samples:,}", *("" if value is None else f"{value:.3f}" for value in values)])
    return markdown_table(["calibration samples", *(METHODS[method] for method in methods)], lines)


CPU_LAYERS = ((4096, 2048), (24576, 4096), (4096, 12288), (10240, 5120), (51200, 5120), (5120, 25600))
"""Linears (N, K) of Qwen3-1.7B, 8B and 32B in the CPU table."""


def cpu_table(name: str) -> str:
    """One line per linear: BWLA and vLLM's bf16 linear, for one token and for 128."""
    rows = {(row["n"], row["k"], row["m"]): row for row in read_result(name)["rows"]}
    lines = []
    for n, k in CPU_LAYERS:
        one, many = rows[n, k, 1], rows[n, k, 128]
        times = [f"{row['bwla_us']:.0f} / {row['vllm_bf16_us']:.0f}" for row in (one, many)]
        ratios = [f"{row['vllm_bf16_us'] / row['bwla_us']:.1f}x" for row in (one, many)]
        kernel = f"{many['vllm_bf16_us'] / many['bwla_matmul_us']:.1f}x"
        share = f"{one['read_share']:.2f}"
        lines.append([f"{n} x {k}", times[0], ratios[0], share, times[1], ratios[1], kernel])
    header = ["N x K", "M = 1: BWLA / bf16 (us)", "speedup", "GEMM alone, share of read bandwidth"]
    return markdown_table([*header, "M = 128: BWLA / bf16 (us)", "speedup", "GEMM alone"], lines)


def variants_table(name: str) -> str:
    """One line per linear and number of tokens: the CPU kernel with table lookup and with AMX, one and two threads."""
    rows = {(row["n"], row["k"], row["m"], row["threads"]): row for row in read_result(name)["rows"]}
    lines = []
    for n, k, m in sorted(
        {key[:3] for key in rows if key[2] in (16, 512)}, key=lambda key: (key[2], key[0] * key[1])
    ):
        cells = [f"{n} x {k}", str(m)]
        for threads in (1, 2):
            row = rows[n, k, m, threads]
            cells += [f"{row['before_us']:.0f} / {row['after_us']:.0f}", f"{row['speedup']:.1f}x"]
        lines.append([*cells, f"{rows[n, k, m, 1]['after_gmacs']:.0f}"])
    header = ["N x K", "M", "one thread: table lookup / AMX (us)", "speedup", "two threads (us)", "speedup"]
    return markdown_table([*header, "AMX, one thread: 10^9 multiply-adds/s"], lines)


def serving_table(names: str) -> str:
    """One line per model and batch size: decode, prefill and memory in vLLM, BWLA and bf16."""
    lines = []
    for row in (row for name in names.split("+") for row in read_result(name)["rows"]):
        cells = [row["model"], str(row["batch"])]
        for phase, digits in (("decode", 1), ("prefill", 0)):
            ours, bf16 = row[f"bwla_{phase}_tok_s"], row.get(f"bf16_{phase}_tok_s")
            cells.append(f"{ours:.{digits}f} / " + ("does not fit" if bf16 is None else f"{bf16:.{digits}f}"))
            cells.append("" if bf16 is None else f"{ours / bf16:.1f}x")
        bf16 = row.get("bf16_resident_bytes")
        memory = "-" if bf16 is None else f"{bf16 / 1e9:.1f}"
        lines.append([*cells, f"{row['bwla_resident_bytes'] / 1e9:.1f} / {memory}"])
    header = ["model", "batch", "decode BWLA / bf16", "speedup", "prefill BWLA / bf16", "speedup"]
    return markdown_table([*header, "memory BWLA / bf16 (GB)"], lines)


GPU_LAYERS = (
    ("gate_up", 1),
    ("down", 1),
    ("qkv", 1),
    ("o", 1),
    ("gate_up", 8),
    ("gate_up", 4096),
    ("qkv", 4096),
)
"""Linears of Qwen3-32B and numbers of tokens in the GPU table: every linear at one token, then larger batches."""


def gpu_table(name: str) -> str:
    """One line per linear of Qwen3-32B: microseconds of BWLA and of cuBLAS in bfloat16."""
    steps = read_result(name)["rows"]
    layers = {(row["layer"], row["m"]): row for row in steps["layer"] if row.get("model") == "32b"}
    heads = {
        row["head"]: row
        for row in steps["chain"]
        if row.get("head") and row["model"] == "32b" and row["m"] == 1
    }
    times = [
        (f"{layer} ({row['n']} x {row['k']}), {m} token{'s' * (m > 1)}", row["fused_us"], row["bf16_us"])
        for layer, m in GPU_LAYERS
        if (row := layers[layer, m])["ok"]
    ]
    head = heads["triton"]
    title = f"8-bit head ({head['v']} x {head['k']}), 1 token"
    times.append((title, head["head_us"], heads["bf16"]["head_us"]))
    return markdown_table(
        ["Qwen3-32B on an H200, microseconds", "BWLA", "cuBLAS bf16", "speedup"],
        [[what, f"{ours:.1f}", f"{bf16:.1f}", f"{bf16 / ours:.1f}x"] for what, ours, bf16 in times],
    )


def summary_table(names: str) -> str:
    """README's few lines: quality, CPU serving and a GPU kernel, from three result files in this order."""
    quality, serving, gpu = names.split("+")
    rows = [row for row in read_rows(quality) if row["abits"] == 6]
    recipes = ("fast", "best")
    perplexities = [statistics.mean(row["ppl"] for row in rows if row["method"] == r) for r in recipes]
    served = next(row for row in read_result(serving)["rows"] if row["batch"] == 1)
    layer = next(
        row
        for row in read_result(gpu)["rows"]["layer"]
        if (row.get("model"), row["layer"], row["m"]) == ("32b", "gate_up", 1)
    )
    ours = [f"{value:.1f}" for value in perplexities]
    lines = [
        [
            "perplexity, example model, `fast` / `best`",
            " / ".join(ours),
            f"{rows[0]['ppl_original']:.1f}",
            quality,
        ]
    ]
    model = served["model"].replace("qwen", "Qwen").replace("b", "B")
    for what, key, scale in (
        ("decode, tokens/s", "decode_tok_s", 1),
        ("prefill, tokens/s", "prefill_tok_s", 1),
        ("memory with KV cache, GB", "resident_bytes", 1e9),
    ):
        pair = [f"{served[f'{side}_{key}'] / scale:.1f}" for side in ("bwla", "bf16")]
        lines.append([f"{model} shape in vLLM, 2 CPU cores, batch 1: {what}", *pair, serving])
    what = f"{layer['n']} x {layer['k']} linear on an H200, 1 token: microseconds"
    lines.append([what, f"{layer['fused_us']:.1f}", f"{layer['bf16_us']:.1f}", gpu])
    linked = [[*cells, f"[json](benchmarks/results/{name}.json)"] for *cells, name in lines]
    return markdown_table(["", "BWLA", "bf16", "result"], linked)


def conversion_table(name: str) -> str:
    """One line per model and method: what a conversion costs."""
    lines = []
    for row in read_result(name)["rows"]:
        method = METHODS.get(row["method"]) or CONVERSION_PEERS[row["method"]]
        text = f"{row['tokens']:,}" if row["tokens"] else "none"
        model = f"{row['model']}, {row['layers']} layer{'s' * (row['layers'] > 1)}"
        cells = [model, method, f"{row['weights'] / 1e6:.0f}", text]
        lines.append([*cells, f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['peak_gb']:.2f}"])
    header = ["model", "method", "million weights", "tokens", "seconds", "CPU seconds", "peak memory (GB)"]
    return markdown_table(header, lines)


def phase_table(name: str) -> str:
    """One line per phase of a conversion: its seconds for each recipe, for the first model of the result."""
    rows = [row for row in read_result(name)["rows"] if "phases" in row]
    rows = [row for row in rows if row["model"] == rows[0]["model"]]
    phases: dict[str, float] = {}
    for row in rows:
        for phase, part in row["phases"].items():
            phases[phase] = max(phases.get(phase, 0.0), part["seconds"])
    lines = []
    for phase in sorted(phases, key=lambda phase: -phases[phase]):
        parts = [row["phases"].get(phase) for row in rows]
        lines.append([phase, *("" if part is None else f"{part['seconds']:.1f}" for part in parts)])
    return markdown_table([f"seconds, {rows[0]['model']}", *(METHODS[row["method"]] for row in rows)], lines)


def embedding_table(name: str) -> str:
    """One line per choice of bits for embedding and head: size and perplexity."""
    result = read_result(name)
    lines = [
        [
            f"{row['embedding_bits']} bits",
            f"{row['head_bits']} bits",
            f"{row['embedding_and_head_bytes'] / 1e6:.1f}",
            f"{row['ppl']:.4f}",
            f"{row['percent']:+.3f} %",
        ]
        for row in result["rows"]
    ]
    return markdown_table(
        [f"{result['model']}: embedding", "head", "MB of both", "perplexity", "change"], lines
    )


def frontier_table(name: str) -> str:
    """One line per model, method, size and number of activation bits: what is lost, mean over the seeds."""
    lines = []
    runs: dict[tuple[Any, ...], Rows] = {}
    for row in read_result(name)["rows"]:
        setting = (row.get("target_bits"), row.get("code_bits"), row.get("group_size"), row["abits"])
        runs.setdefault((row["model"], row["method"], *setting), []).append(row)
    for method, title in FRONTIER_METHODS.items():
        mine = [rows for key, rows in runs.items() if key[1] == method]
        for rows in sorted(mine, key=lambda rows: (rows[0]["model"], rows[0]["abits"], mean(rows, "bits"))):
            row = rows[0]
            size = f", {row['code_bits']} bits, groups of {row['group_size']}" if "code_bits" in row else ""
            predicted = [run for run in rows if run.get("predicted") is not None]
            cells = [row["model"], title + size, f"{mean(rows, 'bits'):.2f}", str(row["abits"])]
            cells += [f"{math.exp(statistics.mean(math.log(run['ppl']) for run in rows)):.2f}"]
            cells += [mean_loss(rows, row["abits"])]
            cells += [f"{mean(predicted, 'predicted'):.3f}" if predicted else ""]
            lines.append([*cells, f"{mean(rows, 'seconds'):.0f}", str(len(rows))])
    header = ["model", "method", "bits per weight", "activation bits", "perplexity", "d", "d predicted"]
    return markdown_table([*header, "seconds", "seeds"], lines)


def mean(rows: Rows, entry: str) -> float:
    """Return the mean of a number over rows."""
    return float(statistics.mean(row[entry] for row in rows))


TABLES: dict[str, Callable[[str], str]] = {
    "families": lambda _: family_table(),
    "quality": quality_table,
    "ablations": ablation_table,
    "amounts": amounts_table,
    "embedding": embedding_table,
    "cpu": cpu_table,
    "variants": variants_table,
    "serving": serving_table,
    "gpu": gpu_table,
    "summary": summary_table,
    "conversion": conversion_table,
    "phases": phase_table,
    "frontier": frontier_table,
}


def with_tables(text: str, document: str) -> str:
    """Return a document's text with every marked table written anew.

    Raises:
        ValueError: if a mark is broken or names an unknown kind of table.
    """

    def write(mark: re.Match[str]) -> str:
        if mark[2] not in TABLES:
            raise ValueError(f"{document}: expected a table of {', '.join(TABLES)}, found {mark[2]}")
        return mark[1] + TABLES[mark[2]](mark[3]) + mark[4]

    new, count = MARKED.subn(write, text)
    if count != text.count(BEGIN):
        raise ValueError(f"{document}: expected {text.count(BEGIN)} complete tables, found {count}")
    return new


def main() -> int:
    """Run the command line; return 1 if --check finds a document out of date."""
    outdated = []
    for file in DOCUMENTS:
        old = file.read_text(encoding="utf-8")
        new = with_tables(old, file.relative_to(ROOT).as_posix())
        if new != old:
            outdated.append(file)
            if "--check" not in sys.argv[1:]:
                file.write_text(new, encoding="utf-8")
    for file in outdated:
        print(f"{'outdated' if '--check' in sys.argv[1:] else 'written'}: {file.relative_to(ROOT)}")
    return int("--check" in sys.argv[1:] and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
