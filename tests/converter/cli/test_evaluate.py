"""`bwla-eval` on the example model: results, files and error messages."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bwla_converter.cli import evaluate as eval_cli
from bwla_converter.cli.evaluate import app, task_names
from bwla_converter.evaluation import perplexity
from bwla_converter.evaluation.perplexity import Perplexity, compare
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from paths import EXAMPLES
from typer.testing import CliRunner


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_perplexity_is_printed_and_written(example_bwla: Path, tmp_path: Path) -> None:
    text, out = EXAMPLES / "text" / "heldout.txt", tmp_path / "result.json"
    done = run(
        EXAMPLES / "model", example_bwla, "--text", text, "--window", "256", "--limit", "4", "--out", out
    )
    assert done.exit_code == 0, done.output
    expected = compare(EXAMPLES / "model", example_bwla, text, 256, 4)
    assert json.loads(out.read_text())["results"]["perplexity"] == pytest.approx(
        {"original": expected.original, "bwla": expected.bwla}
    )
    assert f"{expected.original:.4g}" in done.stdout


def test_the_original_may_be_a_gguf_file(make_gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = make_gguf("Llama"), []

    def compare_texts(original: Path, *others: object) -> Perplexity:
        seen.append(original)
        return Perplexity(2.0, 3.0)

    monkeypatch.setattr(perplexity, "compare_texts", compare_texts)
    checkpoint = tmp_path / "out"
    convert(Options(str(file), checkpoint, rank=2, recipe="data-free"))
    done = run(file, checkpoint, "--text", EXAMPLES / "text" / "heldout.txt")
    assert done.exit_code == 0, done.output
    assert [folder.parent for folder in seen] == [tmp_path / "cache" / "gguf"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("nowhere.txt", "expected a file or wikitext2"), ("short.txt", "expected at least")],
)
def test_text_that_cannot_be_used(example_bwla: Path, tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "short.txt").write_text("few words")
    done = run(EXAMPLES / "model", example_bwla, "--text", tmp_path / text)
    assert done.exit_code == 1
    assert sentence in done.stderr


def test_sets_of_tasks() -> None:
    assert task_names("mmlu,paper-5") == [
        "mmlu",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
    ]
    assert len(set(task_names("paper-7"))) == 7


def test_a_backend_that_does_not_exist() -> None:
    done = run("model", "bwla", "--tasks", "piqa", "--backend", "onnx")
    assert done.exit_code == 2
    assert "vllm" in done.stderr


@pytest.mark.parametrize(("backend", "device"), [("hf", "cpu"), ("vllm", None)])
def test_tasks_run_on_a_device_that_is_here(monkeypatch: pytest.MonkeyPatch, backend: str, device) -> None:
    """lm-eval's transformers backend assumes a GPU; lm-eval itself was tried by hand."""
    arguments: dict[str, object] = {}

    def simple_evaluate(**options: object) -> dict[str, object]:
        arguments.update(options)
        return {"results": {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "piqa"}}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scores = eval_cli.task_scores(Path("model"), ["piqa"], 7, eval_cli.Backend(backend))
    assert scores == {"piqa acc": 0.5}
    assert (arguments["model"], arguments["device"], arguments["limit"]) == (backend, device, 7)
    assert arguments["model_args"] == {"pretrained": "model"}
