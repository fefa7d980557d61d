"""The coverage run: every case is a model, a step that crashes is one failure, and rows say what was found."""

import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter import pipeline
from bwla_converter.options import Options, Summary
from bwla_kernels.errors import SourceError
from pydantic import BaseModel, ValidationError, field_validator

from benchmarks.common.tiny_models import FAMILIES
from benchmarks.coverage import __main__ as coverage
from benchmarks.coverage import worker
from benchmarks.coverage.build import TEXT_FILE, build, write_case
from benchmarks.coverage.case import ORDINARY_TOKENS, Case
from benchmarks.coverage.cases import CASES
from benchmarks.coverage.rows import compare, make_row, merge
from benchmarks.coverage.steps import PROMPT, Answer, Step, run_step, steps_of
from scripts.tables import coverage as table
from scripts.tables import results

RECIPES = ["paper", "fast"]
LLAMA = CASES["llama"]


def answers_of(**changed: Answer) -> dict[str, Answer]:
    """Return what the steps of a case give if all goes well, with changes by the steps' names ("serve_fast")."""
    good: dict[str, Answer] = {
        "build": {"weights": 1000},
        "convert": {"linears": 14, "quantized_weights": 900, "bits_per_weight": 1.5},
        "dequantize": {"dequantized": 14},
        "serve": {"tokens": [5, 6], "logprobs": [{"1": -1.0, "2": -2.0}] * 3},
    }
    answers = {step.name: {**good[step.action], "seconds": 1.0} for step in steps_of(RECIPES)}
    return answers | {name.replace("_", " "): answer for name, answer in changed.items()}


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_model_that_transformers_knows(name: str) -> None:
    case = CASES[name]
    model = build(case)
    assert case.name == name
    assert case.bare or type(model).__name__ == case.architecture
    assert {parameter.dtype for parameter in model.parameters()} <= {
        getattr(torch, case.dtype),
        torch.float32,
    }


def test_the_families_of_the_other_tests_are_among_the_cases() -> None:
    assert {family.architecture for family in FAMILIES.values()} <= {
        case.architecture for case in CASES.values()
    }


def test_a_written_case_has_weights_tokenizer_and_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert (
        write_case(CASES["qwen3_embedding"], tmp_path) == 98304
    )  # 2 x (4 + 2 + 2 + 4) x 32 x 64 + 2 x 3 x 64 x 128
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    ids = AutoTokenizer.from_pretrained(tmp_path)((tmp_path / TEXT_FILE).read_text())["input_ids"]
    assert len(set(ids)) > 80
    assert max(ids) < ORDINARY_TOKENS


def test_a_form_is_served_after_it_was_converted_or_dequantized() -> None:
    steps = steps_of(RECIPES)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) == 12
    for index, step in enumerate(steps):
        assert set(step.needs) <= set(names[:index])
    needs = {step.name: step.needs for step in steps}
    assert needs["serve fast-dequantized"] == ("dequantize fast",)
    assert needs["serve defaults"] == ("convert defaults",)


def test_a_case_that_is_not_served_in_float32_is_scored_in_float32_as_well(
    tmp_path: Path, example_bwla: Path
) -> None:
    added = [step for step in steps_of(RECIPES, "bfloat16") if step not in steps_of(RECIPES)]
    assert [(step.name, step.needs) for step in added] == [
        (f"score {recipe}", (f"convert {recipe}",)) for recipe in RECIPES
    ]
    shutil.copytree(example_bwla, tmp_path / "fast")
    scores = run_step(Step("score", "fast"), CASES["qwen3"], tmp_path)["logprobs"]
    assert len(scores) == len(PROMPT) - 1
    for scored in scores:
        assert sum(map(math.exp, scored.values())) == pytest.approx(1.0, abs=1e-5)


def test_a_row_says_how_far_both_are_from_float32(tmp_path: Path) -> None:
    answers = answers_of(
        serve_fast={"tokens": [5, 6], "logprobs": [{"1": -1.5, "2": -2.0}] * 3},
        score_fast={"logprobs": [{"1": -1.25, "2": -2.0, "3": -9.0}] * 2},
    )
    row = make_row(LLAMA, RECIPES, answers, tmp_path)
    assert row["fast"]["from_float32"] == {"quantized": 0.25, "dequantized": 0.25}
    assert row["fast"]["largest_difference"] == 0.5
    assert "from_float32" not in row["paper"]


def test_an_unfinished_conversion_of_an_earlier_run_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Options] = []

    def fake_convert(options: Options) -> Summary:
        seen.append(options)
        return Summary(str(options.out), 0, 0, 1.0, 1, 1, 1, 0.0, [])

    monkeypatch.setattr(pipeline, "convert", fake_convert)
    for form in (*RECIPES, "defaults"):
        run_step(Step("convert", form), LLAMA, tmp_path)
    assert [options.restart for options in seen] == [True] * 3


def fake_step(step: Step, case: Case, folder: Path) -> Answer:
    """Stand for `run_step`: crash, hang, refuse or succeed, as the step's form says."""
    os.write(1, f"{step.form} runs\n".encode())
    if step.form == "crash":
        os._exit(3)
    if step.form == "hang":
        time.sleep(60)
    if step.form == "refuse":
        raise SourceError("expected this,\nfound that")
    return {"pid": os.getpid(), "case": case.name}


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> worker.Workers:
    """Workers that are forked from this process, with `fake_step` for every step."""
    monkeypatch.setattr(worker, "run_step", fake_step)
    for name, value in worker.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return worker.Workers(tmp_path / "cache", method="fork")


def test_a_step_that_ends_its_process_or_hangs_is_one_failure(
    workers: worker.Workers, tmp_path: Path
) -> None:
    forms = ("first", "crash", "second", "refuse", "hang", "third")
    steps = [Step("convert", form) for form in forms]
    steps.append(Step("convert", "late", ("convert hang",)))
    answers = workers.run(steps, "llama", tmp_path, 1.0)
    assert list(answers) == [step.name for step in steps]
    assert answers["convert crash"] == {"error": "the process ended with exit code 3"}
    assert answers["convert hang"] == {"error": "it took longer than 1 s"}
    assert answers["convert refuse"] == {"error": "expected this, found that"}
    assert answers["convert late"] == {"skipped": "convert hang"}
    good = [answers[f"convert {form}"] for form in ("first", "second", "third")]
    assert {answer["case"] for answer in good} == {"llama"}
    assert len({answer["pid"] for answer in good}) == 3
    ran = (tmp_path / worker.LOG).read_text().splitlines()
    assert [line for line in ran if line.endswith(" runs")] == [f"{form} runs" for form in forms]


def test_every_engine_has_a_process_of_its_own(workers: worker.Workers, tmp_path: Path) -> None:
    names = [("build", "a"), ("convert", "b"), ("serve", "c"), ("serve", "d"), ("convert", "e")]
    answers = workers.run([Step(*name) for name in names], "llama", tmp_path, 10.0)
    pids = [answer["pid"] for answer in answers.values()]
    assert pids[0] == pids[1]
    assert len(set(pids)) == 4


def test_the_message_of_a_foreign_error_names_its_type_and_is_short() -> None:
    assert worker.sentence_of(KeyError("a")) == "KeyError: 'a'"
    assert worker.sentence_of(ValueError()) == "ValueError: no message"
    long = worker.sentence_of(ValueError("x" * 1000))
    assert len(long) == worker.LONGEST_MESSAGE
    assert long.endswith("x...")


def test_the_message_of_a_validation_error_is_its_first_sentence() -> None:
    class Asked(BaseModel):
        name: str

        @field_validator("name")
        @classmethod
        def check(cls, name: str) -> str:
            raise ValueError(f"{name} was supported until v0.28.0. Use an older version.")

    with pytest.raises(ValidationError) as caught:
        Asked(name="Mpt")
    assert worker.sentence_of(caught.value) == "ValidationError: Mpt was supported until v0.28.0."


def test_a_row_of_a_case_that_works(tmp_path: Path) -> None:
    row = make_row(LLAMA, RECIPES, answers_of(), tmp_path)
    assert row["original"] == {"built": True, "served": True}
    assert row["defaults"] == {
        "converted": True,
        "served": True,
        "linears": 14,
        "bits_per_weight": 1.5,
        "share": 0.9,
    }
    assert row["paper"] == {**row["defaults"], "same_tokens": True, "largest_difference": 0.0}
    assert row["seconds"] == len(steps_of(RECIPES))


def test_a_row_keeps_the_sentence_of_a_refusal_without_the_folder(tmp_path: Path) -> None:
    refusal = {"error": f"{tmp_path}/original/config.json: found X"}
    row = make_row(
        LLAMA,
        RECIPES,
        answers_of(
            convert_fast=refusal,
            dequantize_fast={"skipped": "convert fast"},
            serve_fast={"skipped": "convert fast"},
            **{"serve_fast-dequantized": {"skipped": "dequantize fast"}},
        ),
        tmp_path,
    )
    assert row["fast"] == {"converted": False, "served": False, "error": "original/config.json: found X"}
    assert row["paper"]["converted"]


def test_a_row_says_that_the_reference_is_missing(tmp_path: Path) -> None:
    row = make_row(
        LLAMA, RECIPES, answers_of(**{"serve_fast-dequantized": {"error": "out of memory"}}), tmp_path
    )
    assert row["fast"]["served"]
    assert row["fast"]["reference_error"] == "out of memory"
    assert "same_tokens" not in row["fast"]


def test_log_probabilities_are_compared_up_to_the_first_other_token() -> None:
    reference = {
        "tokens": [5, 6, 7],
        "logprobs": [{"1": -1.0}, {"1": -2.0, "2": -3.0}, {"1": -1.0}, {"1": -9.0}],
    }
    same = {**reference, "logprobs": [{"1": -1.5}, {"1": -2.25, "3": -8.0}, {"1": -1.0}, {"1": -9.0}]}
    assert compare(reference, same) == {"same_tokens": True, "largest_difference": 0.5}
    # The scores of the last two positions follow another token.
    other = {"tokens": [5, 8, 7], "logprobs": [{"1": -1.0}, {"1": -2.0}, {"1": -1.25}, {"1": -1.0}]}
    assert compare(reference, other) == {"same_tokens": False, "largest_difference": 0.25}
    broken = {**same, "logprobs": [{"1": math.nan}] * 4}
    assert compare(reference, broken) == {"same_tokens": True, "largest_difference": None}
    assert compare(reference, {"error": "no"}) == {}


def test_embeddings_are_compared_by_direction() -> None:
    assert compare({"embedding": [3.0, 4.0]}, {"embedding": [6.0, 8.0]}) == {"largest_difference": 0.0}
    turned = compare({"embedding": [1.0, 0.0]}, {"embedding": [0.0, 2.0]})
    assert turned == {"largest_difference": 1.0}


def test_a_row_replaces_the_one_of_its_case_in_the_order_of_the_cases() -> None:
    rows: list[dict[str, Any]] = []
    for name, number in (("qwen3", 1), ("llama", 2), ("qwen3", 3)):
        rows = merge(rows, {"case": name, "number": number})
    assert rows == [{"case": "llama", "number": 2}, {"case": "qwen3", "number": 3}]


class FakeWorkers:
    """Stand for `Workers`: every step of every case succeeds."""

    def __init__(self, cache: Path) -> None:
        self.ran: list[str] = []

    def run(self, steps: list[Step], case: str, folder: Path, seconds: float) -> dict[str, Answer]:
        assert folder.is_dir()
        assert steps == steps_of(RECIPES)
        self.ran.append(case)
        return answers_of()


def test_the_result_has_a_row_for_each_case_and_missing_ones_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, made = tmp_path / "coverage.json", []
    monkeypatch.setattr(coverage, "Workers", lambda cache: made.append(FakeWorkers(cache)) or made[-1])
    for words in (["--cases", "qwen3"], ["--cases", "llama,qwen3", "--missing"]):
        monkeypatch.setattr(sys, "argv", ["coverage", *words, "--out", str(out)])
        assert coverage.main() == 0
    assert [workers.ran for workers in made] == [["qwen3"], ["llama"]]
    result = json.loads(out.read_text())
    assert [row["case"] for row in result["rows"]] == ["llama", "qwen3"]
    assert all(row["commit"] == result["commit"] for row in result["rows"])
    assert result["versions"]["transformers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cases llama,lama", "--cases: expected some of llama, .*, found lama"),
        ("--recipes quick", "--recipes: expected some of data-free, paper, fast, best, found quick"),
        ("--missing", "--missing: expected --out"),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        coverage.parse_arguments(words.split())
    assert re.search(message, capsys.readouterr().err)


def test_the_table_has_a_line_for_each_architecture_and_numbers_its_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = {"convert_paper": {"error": "found `X`"}, "convert_fast": {"error": "found `X`"}}
    skipped = {"serve_paper": {"skipped": "convert paper"}, "serve_fast": {"skipped": "convert fast"}}
    lost = {f"serve_{recipe}-dequantized": {"skipped": f"dequantize {recipe}"} for recipe in RECIPES}
    rows = [
        make_row(LLAMA, RECIPES, answers_of(), tmp_path),
        make_row(CASES["gpt2"], RECIPES, answers_of(**refusal, **skipped, **lost), tmp_path),
        make_row(
            CASES["qwen3_next"],
            RECIPES,
            answers_of(serve_original={"error": "no Triton"}, build_original={"weights": 3000}),
            tmp_path,
        ),
    ]
    (tmp_path / "coverage.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    lines = table.coverage_table("coverage").splitlines()
    assert lines[0] == (
        "Of 3 architectures, 2 are converted with both recipes and 2 of these served; "
        "4 of 4 comparisons had the same tokens."
    )
    assert lines[4:] == [
        "| **Dense** |  |  |  |  |  |  |  |",
        f"| `LlamaForCausalLM` | {LLAMA.models} | yes | yes | yes | yes | 0.0e+00 |  |",
        "| `GPT2LMHeadModel` | GPT-2 | no | no |  |  |  | note 1 |",
        "| **Mixtures of experts** |  |  |  |  |  |  |  |",
        "| `Qwen3NextForCausalLM` | Qwen3-Next 80B-A3B | yes | yes | yes | yes | 0.0e+00 | vLLM does not serve the "
        "original here, 30% of the weights, bfloat16 |",
        "",
        "1. `found 'X'`",
    ]
