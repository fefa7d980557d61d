"""Draw the pictures of the documentation from benchmarks/results: tokens per second, sizes of checkpoints, and losses.

    python -m scripts.plot_results                  # writes speed.svg, size.svg and frontier.svg to docs/images

Colours are readable on light and dark pages. The same results give the same bytes.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.serving.engines import COMMON, SHAPES

ROOT = Path(__file__).resolve().parent.parent

OURS, THEIRS, INK = "#2563eb", "#9ca3af", "#6b7280"
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
    "axes.spines.left": False,
}


def served(results: Path) -> list[dict[str, Any]]:
    """Return the rows of every result of benchmarks/serving/serve.py, the smallest model first."""
    rows = [row for file in results.glob("serve_*.json") for row in json.loads(file.read_text())["rows"]]
    return sorted(rows, key=lambda row: (row["bwla_checkpoint_bytes"], row["batch"]))


def bfloat16_bytes(model: str) -> int:
    """Return the size of a Qwen3 model with a shape from benchmarks.serving.engines, at two bytes per parameter."""
    shape = {**COMMON, **SHAPES[model.removeprefix("qwen3-")]}
    hidden, heads, head = shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]
    keys = shape["num_key_value_heads"] * head
    attention = hidden * (2 * heads * head + 2 * keys) + 2 * head
    layer = attention + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    vocabulary = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
    parameters: int = shape["num_hidden_layers"] * layer + vocabulary + hidden
    return 2 * parameters


def bars(
    axes: Axes, labels: Sequence[str], ours: Sequence[float], theirs: Sequence[float | None], better: str
) -> None:
    """Draw two bars per label, each with its value; a missing bf16 value is shown as "does not fit".

    Args:
        better: "faster" or "smaller", the word after the ratio.
    """
    for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        ratio = f"  {max(mine / other, other / mine):.1f}x {better}" if other else ""
        axes.barh(place - 0.2, mine, 0.38, color=OURS, label="BWLA" if place == 0 else None)
        axes.text(mine, place - 0.2, f" {mine:.1f}{ratio}", va="center")
        axes.barh(place + 0.2, other or 0, 0.38, color=THEIRS, label="bf16" if place == 0 else None)
        axes.text(other or 0, place + 0.2, f" {other:.1f}" if other else " bf16 does not fit", va="center")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(x=0.22)
    axes.legend(frameon=False, loc="lower right" if better == "faster" else "upper right")


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
                label=f"{curve.title}{group}, A{abits}",
            )
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight, everything counted")
    axes.set_ylabel("d = ln(perplexity / original's)")
    axes.grid(which="major", color=INK, alpha=0.2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, loc="upper right")


def frontier(results: Path, out: Path) -> None:
    """Draw the losses of the first model in frontier.json, if there is such a file."""
    file = results / "frontier.json"
    if not file.exists():
        return
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if row["model"] == rows[0]["model"]]
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.subplots()
    losses(axes, rows)
    axes.set_title(f"{rows[0]['model']}: what is lost at a given size", color=INK)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Write an SVG file without a date."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    print(f"written: {out}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    rows = served(arguments.results)
    if not rows:
        parser.error(f"{arguments.results} has no serve_*.json: run benchmarks/serving/serve.py")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.62 * len(rows) + 0.6))
        axes = figure.subplots()
        labels = [f"{row['model'].title()}, batch {row['batch']}" for row in rows]
        theirs = [row.get("bf16_decode_tok_s") for row in rows]
        bars(axes, labels, [row["bwla_decode_tok_s"] for row in rows], theirs, "faster")
        axes.set_title("Decode in vLLM, tokens per second, two CPU cores", color=INK)
        save(figure, arguments.out / "speed.svg")

        models = list(dict.fromkeys(row["model"] for row in rows))
        sizes = {row["model"]: row["bwla_checkpoint_bytes"] / 1e9 for row in rows}
        figure = Figure(figsize=(7.2, 0.62 * len(models) + 0.6))
        axes = figure.subplots()
        plain = [bfloat16_bytes(model) / 1e9 for model in models]
        bars(axes, [model.title() for model in models], [sizes[model] for model in models], plain, "smaller")
        axes.set_title("Checkpoint with 8-bit head, GB", color=INK)
        save(figure, arguments.out / "size.svg")
        frontier(arguments.results, arguments.out / "frontier.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
