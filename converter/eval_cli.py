"""`bwla-eval`: perplexity and lm-eval tasks of an original and its BWLA version, side by side."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from bwla_kernels.errors import BWLAError, SourceError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

EXAMPLES = """
Examples:

  bwla-eval Qwen/Qwen3-8B ./qwen3-8b-bwla                       WikiText-2 as the papers measure it

  bwla-eval ./model ./model-bwla --text novel.txt --window 512

  bwla-eval ./model ./model-bwla --tasks piqa,arc_easy --out result.json
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def task_scores(folder: Path, tasks: list[str], limit: int | None) -> dict[str, float]:
    """Scores of lm-eval tasks through its transformers back end, with our quantizer registered.

    Raises:
        SourceError: lm-eval is not installed.
    """
    try:
        import lm_eval
    except ImportError:
        raise SourceError("--tasks needs lm-eval: pip install 'bwla[eval]'") from None
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder)}, tasks=tasks, limit=limit
    )
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if metric.startswith(("acc", "exact_match", "pass")) and "stderr" not in metric
    }


def show(rows: dict[str, dict[str, float]]) -> None:
    """A table with a row for each figure."""
    table = Table("", "original", "BWLA", "ratio", title="lower perplexity and higher scores are better")
    for name, row in rows.items():
        ratio = row["bwla"] / row["original"] if row["original"] else math.nan
        table.add_row(name, f"{row['original']:.4g}", f"{row['bwla']:.4g}", f"{ratio:.3f}")
    Console().print(table)


@app.command(epilog=EXAMPLES)
def evaluate(
    original: Annotated[str, typer.Argument(help="The original: a folder or a Hub id.")],
    bwla: Annotated[Path, typer.Argument(help="The folder that bwla-convert wrote from it.")],
    text: Annotated[
        str, typer.Option(help="A text file, or wikitext2: its test split in one piece.")
    ] = "wikitext2",
    window: Annotated[int, typer.Option(help="Tokens of a window; the papers use 2048.", min=2)] = 2048,
    limit: Annotated[
        int | None, typer.Option(help="Use at most so many windows, and examples of a task.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="lm-eval tasks, by commas, for example piqa,hellaswag,winogrande.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Compare an original with its BWLA version on the same text and tasks."""
    from bwla_converter.calibration import dataset_text
    from bwla_converter.evaluate import compare_texts
    from bwla_converter.source import locate

    console = Console(stderr=True)
    rows: dict[str, dict[str, Any]] = {}
    try:
        folder, _ = locate(original)
        if text == "wikitext2":
            content = dataset_text("wikitext2-test")
        elif Path(text).is_file():
            content = Path(text).read_text(encoding="utf-8")
        else:
            raise SourceError(f"--text {text}: expected a file or wikitext2, found neither: check the path")
        found = compare_texts(folder, bwla, content, window, limit)
        rows["perplexity"] = {"original": found.original, "bwla": found.bwla}
        if tasks:
            names = tasks.split(",")
            before, after = (task_scores(each, names, limit) for each in (folder, bwla))
            rows |= {name: {"original": before[name], "bwla": after[name]} for name in before}
    except BWLAError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    show(rows)
    if out is not None:
        given = {"original": original, "bwla": str(bwla), "text": text, "window": window, "limit": limit}
        out.write_text(json.dumps({**given, "results": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point of `bwla-eval`."""
    app()
