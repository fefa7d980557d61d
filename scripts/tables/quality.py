"""Tables about accuracy."""

import json
import math
import statistics
import textwrap
from typing import Any

from scripts.tables.results import (
    METHODS,
    ROOT,
    Rows,
    markdown_table,
    mean,
    mean_loss,
    read_result,
    read_rows,
)

ABITS = (16, 8, 6, 4)
LONGEST_ANSWER = 60
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


def demo_table(name: str) -> str:
    """One line for the original and for each conversion of the demo."""
    lines = []
    for row in read_result(name)["rows"]:
        answer = textwrap.shorten(row["answer"], LONGEST_ANSWER, placeholder=" ...")
        size = f"{row['size'] / 1e6:.0f}"
        numbers = [f"{row['bits']:.2f}", size, f"{row['perplexity']:.1f}", f"{row['speed']:.1f}"]
        lines.append([row["title"], *numbers, answer])
    header = ["model", "bits per weight", "weights, MB", "perplexity", "tokens/s", "answer"]
    return markdown_table(header, lines)


def llama_cpp_table(name: str) -> str:
    """One line per type of weights: llama.cpp's perplexity, and how the imported model's compares."""
    lines = []
    for row in read_result(name)["rows"]:
        ours = [row[f"a{abits}"] for abits in (8, 16)]
        ratios = [f"{100 * (found['ratio'] - 1):+.2f} %" for found in ours]
        keys = ("top_1_agreement", "top_1_agreement_where_clear")
        agreements = [f"{100 * ours[0][key]:.1f} %" for key in keys]
        lines.append([row["type"], f"{row['ppl_llama_cpp']:.2f}", *ratios, *agreements])
    header = ["type", "perplexity, llama.cpp", "imported, 8-bit activations", "16-bit"]
    header += ["same likeliest token", "where it leads by 0.5 nats"]
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


def okt_table(name: str) -> str:
    """One line per way to learn rotations: the errors and the time, in units of the first way's."""
    rows, lines = read_result(name)["rows"], []
    for row in rows:
        errors = [f"{error:.3f}" for error in row["errors"]]
        time = f"{row['seconds'] / rows[0]['seconds']:.2f}"
        lines.append([row["objective"], str(row["rounds"]), f"{row['relaxation']:g}", *errors, time])
    planes = ["1 plane", "2 planes", "3 planes", "4 planes"]
    return markdown_table(["objective", "rounds", "over-relaxation", *planes, "time"], lines)


def expert_transforms_table(name: str) -> str:
    """One line per choice for the experts' down projections: perplexity and what is lost."""
    meaning = {
        "layer": "one input transform a layer, a Hessian for each expert (`fast`)",
        "pooled": "one input transform and one Hessian a layer",
        "expert": "an input transform and a Hessian for each expert",
    }
    lines = [
        [meaning[row["input_transform"]], f"{row['ppl']:.2f}", f"{row['d']:.3f}"]
        for row in read_result(name)["rows"]
    ]
    return markdown_table(["down projections of a layer's experts", "perplexity", "d"], lines)


def head_table(name: str) -> str:
    """One line per head: its size, and the perplexity with each number of activation bits."""
    rows = read_result(name)["rows"]
    lines = []
    for head in dict.fromkeys(row["head"] for row in rows):
        mine = {row["abits"]: row for row in rows if row["head"] == head}
        size = f"{next(iter(mine.values()))['bytes'] / 1e6:.1f}"
        found = [
            f"{mine[bits]['ppl']:.2f} ({mine[bits]['d']:.3f})" if bits in mine else "" for bits in (6, 8, 16)
        ]
        lines.append([head, size, *found])
    return markdown_table(["head", "MB", "6-bit inputs", "8-bit inputs", "16-bit inputs"], lines)


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
            size = ""
            if "code_bits" in row:
                bits = f"{row['code_bits']} bit{'s' if row['code_bits'] > 1 else ''}"
                size = f", {bits}, groups of {row['group_size']}"
            predicted = [run for run in rows if run.get("predicted") is not None]
            cells = [row["model"], title + size, f"{mean(rows, 'bits'):.2f}", str(row["abits"])]
            cells += [f"{math.exp(statistics.mean(math.log(run['ppl']) for run in rows)):.2f}"]
            cells += [mean_loss(rows, row["abits"])]
            cells += [f"{mean(predicted, 'predicted'):.3f}" if predicted else ""]
            lines.append([*cells, f"{mean(rows, 'seconds'):.0f}", str(len(rows))])
    header = ["model", "method", "bits per weight", "activation bits", "perplexity", "d", "d predicted"]
    return markdown_table([*header, "seconds", "seeds"], lines)


def calibration_text_table(name: str) -> str:
    """One line per model and calibration text: the losses on real and on self-written text."""
    lines = []
    for row in read_result(name)["rows"]:
        text = "written by the model" if row["calibration"] == "self" else f"real ({row['calibration']})"
        losses = [f"{row['d'][kind]:.3f}" for kind in ("real text", "self-written text")]
        lines.append([row["model"], f"{row['bits']:.2f}", text, *losses])
    header = ["model", "bits per weight", "calibration text", "d on real text", "d on self-written text"]
    return markdown_table(header, lines)


def training_table(_: str) -> str:
    """One line per text: how well the example model predicts it, from the record of its training."""
    record = json.loads((ROOT / "examples" / "model" / "training.json").read_text(encoding="utf-8"))
    texts = {
        "text": "training text",
        "valid": "validation: other books, evaluated during training",
        "test": "`heldout.txt`, evaluated once",
    }
    lines = []
    for key, title in texts.items():
        found = record["final"][key]
        numbers = [f"{found['loss']:.3f}", f"{found['perplexity']:.1f}", f"{found['bits_per_byte']:.3f}"]
        lines.append([title, *numbers])
    windows = f"text (separate windows of {record['recipe']['window']} tokens)"
    return markdown_table([windows, "loss, nats per token", "perplexity", "bits per byte"], lines)
