"""Draw the two pictures of the documentation from benchmarks/results: tokens per second, and sizes of checkpoints.

    python -m scripts.plot_results                  # writes docs/images/speed.svg and docs/images/size.svg

Colours are readable on light and dark pages. The same results give the same bytes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
