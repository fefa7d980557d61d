"""`bwla-eval`: perplexity and lm-eval tasks of an original and its BWLA version, side by side."""

import json
import math
from enum import StrEnum
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

  bwla-eval ./model ./model-bwla --tasks paper-5,mmlu --backend vllm
"""

_FIVE = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
TASK_SETS = {"paper-5": _FIVE, "paper-7": (*_FIVE, "boolq", "openbookqa")}
"""Names for the zero-shot tasks that papers of this field report together."""


class Backend(StrEnum):
    """What can run tasks; lm-eval's names."""

    TRANSFORMERS = "hf"
    VLLM = "vllm"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def task_names(tasks: str) -> list[str]:
    """Names by commas; a name of TASK_SETS stands for its tasks."""
    return [task for name in tasks.split(",") for task in TASK_SETS.get(name, (name,))]


def task_scores(
    folder: Path, tasks: list[str], limit: int | None, backend: Backend = Backend.TRANSFORMERS
) -> dict[str, float]:
    """Scores of lm-eval tasks, by "task metric".

    Args:
        folder: an original or a BWLA checkpoint.
        tasks: lm-eval's names.
        limit: examples of each task at most.
        backend: in vLLM our plugin loads the checkpoint, in transformers our quantizer.

    Raises:
        SourceError: lm-eval is not installed.
    """
    try:
        import lm_eval
    except ImportError:
        raise SourceError("--tasks needs lm-eval: pip install 'bwla[eval]'") from None
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers
    from bwla_converter.common.devices import choose_device

    found = lm_eval.simple_evaluate(
        model=str(backend),
        model_args={"pretrained": str(folder)},
        tasks=tasks,
        limit=limit,
        # lm-eval's default is a GPU, whether there is one or not; vLLM chooses for itself.
        device=choose_device("auto").type if backend == Backend.TRANSFORMERS else None,
        confirm_run_unsafe_code="humaneval" in tasks,  # it runs what the model writes
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
        str,
        typer.Option(
            help="lm-eval tasks by commas: piqa,mmlu,gsm8k,humaneval (which runs what the model writes), or a set: "
            + ", ".join(TASK_SETS)
        ),
    ] = "",
    backend: Annotated[
        Backend, typer.Option(help="lm-eval's back end: hf (transformers) or vllm.")
    ] = Backend.TRANSFORMERS,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Compare an original with its BWLA version on the same text and tasks."""
    from bwla_converter.calibration.text import dataset_text
    from bwla_converter.evaluation.perplexity import compare_texts
    from bwla_converter.report.data import calibration_warning
    from bwla_converter.source.model import locate

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
            names = task_names(tasks)
            before, after = (task_scores(each, names, limit, backend) for each in (folder, bwla))
            rows |= {name: {"original": before[name], "bwla": after[name]} for name in before}
    except BWLAError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None
    config = json.loads((bwla / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    warning = calibration_warning(config["provenance"]["calibration"])
    if text == "wikitext2" and warning is not None:
        console.print(f"[bold]note:[/] {warning}", soft_wrap=True)
    show(rows)
    if out is not None:
        given = {"original": original, "bwla": str(bwla), "text": text, "window": window, "limit": limit}
        out.write_text(json.dumps({**given, "results": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point of `bwla-eval`."""
    app()
