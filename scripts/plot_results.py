"""Draw the pictures of the documentation from benchmarks/results: tokens per second, sizes of checkpoints, and losses.

    python -m scripts.plot_results                  # writes speed.svg, size.svg and frontier.svg to docs/images

Colours are readable on light and dark pages. The same results and the same matplotlib give the same bytes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.serving.engines import COMMON, SHAPES

ROOT = Path(__file__).resolve().parent.parent

INK = "#6b7280"
STYLE: Any = {
    "svg.hashsalt": "bwla",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
ENGINES = {
    "bwla": ("BWLA", "#2563eb"),
    "bwla, 4 planes": ("BWLA, head in 4 planes", "#60a5fa"),
    "llama_Q4_0": ("llama.cpp Q4_0", "#d97706"),
    "llama_Q1_0": ("llama.cpp Q1_0", "#fbbf24"),
    "bf16": ("bf16", "#9ca3af"),
}
"""Titles and colours of the engines, in the order of the bars."""

SIDE_BY_SIDE = ("head_serve_0.5b", "head_serve_1.7b", "experts_serve")
IMPORTED = ("imported_serve_0.6b", "imported_serve_1.7b")
"""Results in which BWLA and llama.cpp were timed in one run; in those of `IMPORTED`, on the same weights."""

BAR = 0.8
"""Height of a bar, where bars are 1 apart and groups of bars 1 more."""


@dataclass(frozen=True)
class Group:
    """The bars of one model.

    Attributes:
        title: the model.
        figures: of each engine in `ENGINES`: tokens per second of "decode" and "prefill", and "size" in GB.
        missing: what is written instead of a speed that bf16 does not have.
    """

    title: str
    figures: Mapping[str, Mapping[str, float]]
    missing: str = ""


def read_result(results: Path, name: str) -> dict[str, Any]:
    """Read a result."""
    result: dict[str, Any] = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    return result


def speeds(row: Mapping[str, Any], engine: str) -> dict[str, float]:
    """Return tokens per second of an engine in a row, if it was timed there."""
    found = {phase: row.get(f"{engine}_{phase}_tok_s") for phase in ("decode", "prefill")}
    return {phase: speed for phase, speed in found.items() if speed is not None}


def side_by_side(results: Path, name: str) -> Group:
    """Return the bars of a result of benchmarks.serving.serve with llama.cpp, for one request."""
    result = read_result(results, name)
    rows = [row for row in result["rows"] if row["batch"] == 1]
    model = rows[0]["model"]
    figures: dict[str, dict[str, float]] = {}
    for row in rows:
        ours = "bwla" if row.get("head_bits", 8) == 8 else f"bwla, {row['head_bits']} planes"
        figures[ours] = {**speeds(row, "bwla"), "size": row["bwla_checkpoint_bytes"] / 1e9}
    for engine in ("llama_Q4_0", "llama_Q1_0"):
        if found := speeds(rows[0], engine):
            figures[engine] = {**found, "size": rows[0][f"{engine}_file_bytes"] / 1e9}
    figures["bf16"] = {**speeds(rows[0], "bf16"), "size": bfloat16_bytes(model) / 1e9}
    fits = bfloat16_bytes(model) < result["machine"]["memory_gib"] * 2**30
    return Group(model.title(), figures, "bf16 not measured" if fits else "bf16 does not fit into memory")


def imported(results: Path, name: str) -> Group:
    """Return the bars of a result of benchmarks.serving.imported: one-bit weights that both engines have exactly."""
    row = next(row for row in read_result(results, name)["rows"] if row["type"] == "Q1_0")
    figures = {"bwla": speeds(row, "bwla"), "llama_Q1_0": speeds(row, "llama")}
    return Group(f"{row['model'].title()},\nthe same Q1_0 weights", figures)


def bfloat16_bytes(model: str) -> int:
    """Return the size of a model with a shape from benchmarks.serving.engines, at two bytes per parameter."""
    shape = {**COMMON, **SHAPES[model.partition("-")[2]]}
    hidden, heads, head = shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]
    keys = shape["num_key_value_heads"] * head
    attention = hidden * (2 * heads * head + 2 * keys)
    attention += heads * head + 2 * keys if shape["model_type"] == "qwen2" else 2 * head  # biases, or norms
    if "num_experts" in shape:
        experts = shape["num_experts"]
        mlp = hidden * experts * (1 + 3 * shape["moe_intermediate_size"])
    else:
        mlp = 3 * hidden * shape["intermediate_size"]
    layer = attention + mlp + 2 * hidden
    vocabulary = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    parameters: int = shape["num_hidden_layers"] * layer + vocabulary + hidden
    return 2 * parameters


def bars(axes: Axes, groups: Sequence[Group], figure: str) -> None:
    """Draw a figure of every engine of every group, each with its value; sizes relative to bf16.

    Args:
        axes: where to draw.
        groups: the groups, from top to bottom.
        figure: which of a group's figures: "decode", "prefill" or "size".
    """
    digits = {"decode": 1, "prefill": 0, "size": 2}[figure]
    place, ticks = 0.0, []
    for group in groups:
        shown = [engine for engine in ENGINES if engine in group.figures]
        unit = group.figures["bf16"]["size"] if figure == "size" else 1.0
        for number, engine in enumerate(shown):
            value = group.figures[engine].get(figure)
            text = group.missing if value is None else f"{value:.{digits}f}"
            length = (value or 0.0) / unit
            axes.barh(place + number, length, BAR, color=ENGINES[engine][1])
            axes.text(length, place + number, f" {text}", va="center", fontsize=8.5)
        ticks.append(place + (len(shown) - 1) / 2)
        place += len(shown) + 1
    axes.set_yticks(ticks, [group.title for group in groups])
    axes.set_ylim(place - 1, -1)
    axes.set_xticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.16)


def legend(figure: Figure, groups: Sequence[Group]) -> None:
    """Draw one legend below all panels, with the engines that the groups have."""
    used = [engine for engine in ENGINES if any(engine in group.figures for group in groups)]
    handles = [Patch(color=ENGINES[engine][1], label=ENGINES[engine][0]) for engine in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def speed(results: Path, out: Path) -> None:
    """Draw decode and prefill of one request, next to each other."""
    groups = [*(side_by_side(results, name) for name in SIDE_BY_SIDE)]
    groups += [imported(results, name) for name in IMPORTED]
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, phase in zip(panels, ("decode", "prefill"), strict=True):
        bars(axes, groups, phase)
        axes.set_title(phase.title(), color=INK, fontsize=10)
    title = "Tokens per second of one request on two CPU cores with AVX2; BWLA and bf16 in vLLM"
    figure.suptitle(title, color=INK, fontsize=11)
    legend(figure, groups)
    save(figure, out)


def size(results: Path, out: Path) -> None:
    """Draw the sizes of checkpoints and of llama.cpp's files."""
    groups = [side_by_side(results, name) for name in SIDE_BY_SIDE]
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    bars(axes, groups, "size")
    axes.set_title("Size of all weights in GB; bars relative to bf16", color=INK, fontsize=11)
    legend(figure, groups)
    save(figure, out)


@dataclass(frozen=True)
class Curve:
    """How a method is drawn in the picture of losses.

    Attributes:
        title: its name in the legend.
        colour: colour of the line.
        marker: matplotlib's marker of its points.
    """

    title: str
    colour: str
    marker: str


CURVES = {
    "fast": Curve("BWLA fast", "#2563eb", "o"),
    "best": Curve("BWLA best", "#0d9488", "D"),
    "llmcompressor-gptq": Curve("GPTQ, symmetric", "#d97706", "v"),
    "llmcompressor-gptq-asym": Curve("GPTQ, zero points", "#dc2626", "^"),
    "autoround-light": Curve("AutoRound light", "#9333ea", "s"),
    "hqq": Curve("HQQ", "#6b7280", "P"),
}
"""Methods of benchmarks.quality.frontier in the picture."""


def curve_points(rows: Sequence[dict[str, Any]], group_size: int | None) -> list[tuple[float, float]]:
    """Return (bits per weight, mean d over the seeds) of a method at one group size, fewest bits first.

    Sizes at which nothing is lost are left out: a logarithmic axis cannot show them.
    """
    sizes: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("group_size") == group_size:
            sizes.setdefault(row.get("code_bits") or row.get("target_bits"), []).append(row)
    means = [
        (statistics.mean(row["bits"] for row in runs), statistics.mean(row["d"] for row in runs))
        for runs in sizes.values()
    ]
    return sorted(point for point in means if point[1] > 0)


def losses(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw d against bits per weight: a line for each method, number of activation bits and group size.

    Args:
        axes: where to draw.
        rows: rows of benchmarks.quality.frontier for one model.
    """
    for method, curve in CURVES.items():
        mine = [row for row in rows if row["method"] == method]
        lines = dict.fromkeys((row["abits"], row.get("group_size")) for row in mine)
        for place, (abits, group_size) in enumerate(lines):
            points = curve_points([row for row in mine if row["abits"] == abits], group_size)
            if not points:
                continue
            group = f", groups of {group_size}" if group_size else ""
            bits, lost = zip(*points, strict=True)
            axes.plot(
                bits,
                lost,
                color=curve.colour,
                marker=curve.marker,
                linestyle=("-", "--", ":")[place % 3],
                label=f"{curve.title}{group}, {abits}-bit activations",
            )
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, everything counted")
    axes.set_ylabel("d = ln(perplexity / original's)")
    axes.grid(which="major", color=INK, alpha=0.2)
    axes.yaxis.set_major_formatter("{x:g}")


def frontier(results: Path, out: Path) -> None:
    """Draw the losses of the first model of frontier.json."""
    rows = read_result(results, "frontier")["rows"]
    rows = [row for row in rows if row["model"] == rows[0]["model"]]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    losses(axes, rows)
    axes.set_title(f"{rows[0]['model']}: loss at a given size; less is better", color=INK, fontsize=11)
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Write an SVG file without a date."""
    out.parent.mkdir(parents=True, exist_ok=True)
    creator = f"matplotlib {mpl.__version__}"
    figure.savefig(out, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": creator})
    print(f"written: {out}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    with mpl.rc_context(STYLE):
        for draw in (speed, size, frontier):
            draw(arguments.results, arguments.out / f"{draw.__name__}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
