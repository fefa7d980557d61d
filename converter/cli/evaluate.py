"""`bwla-eval`: compare a BWLA checkpoint with the original by perplexity and lm-eval tasks."""

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from bwla_converter.cli.errors import errors_reported
from bwla_kernels.errors import SourceError
from rich.console import Console
from rich.table import Table

EXAMPLES = """
Examples:

  bwla-eval Qwen/Qwen3-8B ./qwen3-8b-bwla

  bwla-eval ./model ./model-bwla --text novel.txt --window 512

  bwla-eval ./model ./model-bwla --tasks piqa,arc_easy --out result.json

  bwla-eval ./model ./model-bwla --tasks paper-5,mmlu --backend vllm
"""

_FIVE = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")
TASK_SETS = {"paper-5": _FIVE, "paper-7": (*_FIVE, "boolq", "openbookqa")}
"""Sets of zero-shot tasks that papers on quantization report together."""


Row = dict[str, float]
"""A result of the original and of the BWLA checkpoint, under "original" and "bwla"."""


class Backend(StrEnum):
    """lm-eval's names of the backends that can run tasks."""

    TRANSFORMERS = "hf"
    VLLM = "vllm"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


def task_names(tasks: str) -> list[str]:
    """Split comma-separated task names, and replace each name of `TASK_SETS` by its tasks."""
    return [task for name in tasks.split(",") for task in TASK_SETS.get(name, (name,))]


def task_scores(
    folder: Path, tasks: list[str], limit: int | None, backend: Backend = Backend.TRANSFORMERS
) -> dict[str, float]:
    """Return the scores of lm-eval tasks, by task and metric, like "piqa acc".

    Args:
        folder: an original model or a BWLA checkpoint.
        tasks: lm-eval's names of the tasks.
        limit: maximum number of examples of each task.
        backend: runs the model. A BWLA checkpoint is loaded by our plugin in vLLM, by our quantizer in transformers.

    Raises:
        SourceError: lm-eval is not installed.
    """
    try:
        import lm_eval
    except ImportError:
        raise SourceError("--tasks needs lm-eval: pip install 'bwla[eval]'") from None
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers
    from bwla_converter.common.devices import choose_device

    results = lm_eval.simple_evaluate(
        model=str(backend),
        model_args={"pretrained": str(folder)},
        tasks=tasks,
        limit=limit,
        # lm-eval uses a GPU by default even if there is none; vLLM chooses the device itself.
        device=choose_device("auto").type if backend == Backend.TRANSFORMERS else None,
        confirm_run_unsafe_code="humaneval" in tasks,  # it executes code that the model writes
    )
    return {
        f"{task} {metric.partition(',')[0]}": float(value)
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if metric.startswith(("acc", "exact_match", "pass")) and "stderr" not in metric
    }


def show(rows: dict[str, Row]) -> None:
    """Print a table with a row for each result."""
    table = Table("", "original", "BWLA", "ratio", title="lower perplexity and higher scores are better")
    for name, row in rows.items():
        ratio = row["bwla"] / row["original"] if row["original"] else math.nan
        table.add_row(name, f"{row['original']:.4g}", f"{row['bwla']:.4g}", f"{ratio:.3f}")
    Console().print(table)


@app.command(epilog=EXAMPLES)
def evaluate(
    original: Annotated[
        str,
        typer.Argument(
            help="The original model: a folder, a GGUF file, or the id of one on the Hub.", metavar="ORIGINAL"
        ),
    ],
    bwla: Annotated[
        Path, typer.Argument(help="The folder that bwla-convert wrote from it.", metavar="CHECKPOINT")
    ],
    text: Annotated[
        str,
        typer.Option(
            help="A text file, or wikitext2 for the test split of WikiText-2.", rich_help_panel="Perplexity"
        ),
    ] = "wikitext2",
    window: Annotated[
        int,
        typer.Option(help="Sequence length in tokens; papers use 2048.", min=2, rich_help_panel="Perplexity"),
    ] = 2048,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated lm-eval tasks, like piqa,mmlu,gsm8k,humaneval (which executes code that the model "
            f"writes), or a set of them: {', '.join(TASK_SETS)}.",
            rich_help_panel="Tasks",
        ),
    ] = "",
    backend: Annotated[
        Backend,
        typer.Option(help="What runs the tasks: hf (transformers) or vllm.", rich_help_panel="Tasks"),
    ] = Backend.TRANSFORMERS,
    limit: Annotated[
        int | None, typer.Option(help="Maximum number of sequences, and of examples of each task.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
) -> None:
    """Compare a BWLA checkpoint with the original model on the same text and tasks."""
    console = Console(stderr=True)
    with errors_reported(console):
        folder = _locate(console, original)
        rows = _perplexity(folder, bwla, text, window, limit)
        if tasks:
            rows |= _scores(folder, bwla, task_names(tasks), limit, backend)
        _warn_of_training_text(console, bwla, text)
        show(rows)
        if out is not None:
            settings = {
                "original": original,
                "bwla": str(bwla),
                "text": text,
                "window": window,
                "limit": limit,
            }
            out.write_text(json.dumps({**settings, "results": rows}, indent=1) + "\n", encoding="utf-8")


def _locate(console: Console, original: str) -> Path:
    """Return the folder of the original model; show how much of a GGUF file has been dequantized."""
    from bwla_converter.cli.progress import DequantizationBar, ProgressListener
    from bwla_converter.source.folder.locate import locate
    from rich.progress import Progress

    with Progress(*ProgressListener.columns(), console=console, transient=True) as progress:
        folder, _ = locate(original, DequantizationBar(progress))
    return folder


def _perplexity(original: Path, bwla: Path, text: str, window: int, limit: int | None) -> dict[str, Row]:
    from bwla_converter.calibration.text import dataset_text
    from bwla_converter.calibration.text_files import read_text
    from bwla_converter.evaluation.perplexity import compare_texts

    if text == "wikitext2":
        content = dataset_text("wikitext2-test")
    elif Path(text).is_file():
        content = read_text(Path(text), "--text")
    else:
        raise SourceError(f"--text {text}: expected a file or wikitext2, found neither: check the path")
    result = compare_texts(original, bwla, content, window, limit)
    return {"perplexity": {"original": result.original, "bwla": result.bwla}}


def _scores(
    original: Path, bwla: Path, tasks: list[str], limit: int | None, backend: Backend
) -> dict[str, Row]:
    before, after = (task_scores(model, tasks, limit, backend) for model in (original, bwla))
    return {name: {"original": before[name], "bwla": after[name]} for name in before}


def _warn_of_training_text(console: Console, bwla: Path, text: str) -> None:
    """Print a note if the model was calibrated on the training split of the text that it is evaluated on."""
    from bwla_converter.report.data import calibration_warning

    config = json.loads((bwla / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    warning = calibration_warning(config["provenance"]["calibration"])
    if text == "wikitext2" and warning is not None:
        console.print(f"[bold]note:[/] {warning}", soft_wrap=True)


def main() -> None:
    """Entry point of `bwla-eval`."""
    app()
