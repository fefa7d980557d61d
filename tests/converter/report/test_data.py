"""The report of a conversion: its figures add up, its page is complete, escaped and self-contained."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_converter.report.data import PAGE_FILE, REPORT_FILE, add_samples, calibration_warning, report_json
from bwla_converter.report.page import render_page
from bwla_converter.report.samples import PROMPTS, complete, samples_problem
from paths import EXAMPLES


class Checker(HTMLParser):
    """Counts elements, and records unclosed elements and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.links == []
    assert "script" not in checker.counts
    assert "url(" not in page
    assert "@import" not in page
    return checker


@pytest.fixture
def report(example_bwla: Path) -> dict:
    return json.loads((example_bwla / REPORT_FILE).read_text())


def test_the_peak_memory_is_that_of_the_process_not_of_the_one_that_started_it() -> None:
    held = torch.ones(2**28)  # 1 GiB, more than a process without work takes
    command = "from bwla_converter.report.data import peak_resident_bytes; print(peak_resident_bytes())"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert 2**24 < int(run.stdout) < held.nbytes


def test_bits_and_bytes_add_up(report: dict, example_bwla: Path) -> None:
    assert sum(report["bits"].values()) == pytest.approx(report["bits_per_weight"], abs=1e-4)
    assert report["bits"]["signs"] == 1.0
    assert sum(report["bytes"]["before"].values()) == report["bytes_before"]
    assert sum(report["bytes"]["after"].values()) == report["bytes_after"]
    contents = read_contents(example_bwla)
    assert contents.bits_per_weight == pytest.approx(report["bits_per_weight"])
    assert contents.bytes["quantized linears"] * 8 == pytest.approx(
        contents.bits_per_weight * contents.weights
    )


def test_the_page_shows_size_and_loss_and_where_the_planes_are(report: dict) -> None:
    assert "Size and loss" not in render_page(report), "without calibration text, nothing is predicted"
    names = [linear["name"] for linear in report["linears"]]
    chosen = {
        **report,
        "bits_per_weight": 2.1987,
        "predicted_loss": 0.362,
        "measured_loss": 0.4831,
        "predicted_losses": {"1.16": 1.09, "3.2": 0.142, "1.1": 50.0},
        "planes": [1, 3],
        "planes_of_linears": {name: 1 + 2 * (index % 2) for index, name in enumerate(names)},
    }
    page = render_page(chosen)
    check_page(page)
    drawing = page.partition("Size and loss")[2].partition("<table>")[0]
    assert drawing.count("<svg") == 2, "for wide and for narrow windows"
    for text in (
        ">0.362 predicted<",
        ">0.483 measured<",
        "this conversion, measured, bits per weight 2.1987",
    ):
        assert drawing.count(text) == 2
    assert ">20<" in drawing, "losses from 0.142 to 50 are on a logarithmic axis"
    rows = page.partition("Size and loss")[2].partition("<table>")[2].partition("</table>")[0]
    order = ["1.10", "1.16", "2.199, this conversion", "3.20"]
    assert [rows.index(text) for text in order] == sorted(rows.index(text) for text in order)
    assert "over 1000000" in rows
    assert "<b>0.483</b><span>nats per token lost, measured; 0.362 predicted" in page
    assert "Planes of each linear" in page
    assert page.count("<th>planes</th>") == 4
    uniform = render_page({**chosen, "planes": [1], "measured_loss": None})
    assert "Planes of each linear" not in uniform
    assert "predicted<" in uniform
    assert "measured<" not in uniform.partition("Size and loss")[2].partition("<table>")[0]
    alone = render_page({**chosen, "predicted_losses": {}}).partition("Size and loss")[2]
    assert "<svg" not in alone.partition("<table>")[0], "one point is no picture"
    gained = render_page({**chosen, "measured_loss": -0.001})
    assert ">-0.001 measured<" in gained, "a loss below zero has no logarithm"
    embedding = render_page({**chosen, "loss_unit": "cosine distance per token"})
    assert "<span>cosine distance per token lost, measured; 0.362 predicted" in embedding
    assert "perplexity" in page.partition("Size and loss")[2]
    assert "perplexity" not in embedding.partition("Size and loss")[2].partition("</table>")[0]


def test_every_linear_has_its_statistics(report: dict) -> None:
    weights = report["statistics"]["weights"]
    assert list(weights) == [linear["name"] for linear in report["linears"]]
    for change in weights.values():
        # The rotation makes the rows more bimodal.
        assert change["after"]["bimodality"] > change["before"]["bimodality"]
        assert change["after"]["binarization_error"] < change["before"]["binarization_error"]
    assert report["statistics"]["activations"] == {}
    assert report["memory"]["cpu"] > 1e6
    assert report["versions"]["torch"]


def test_recipes_with_calibration_text_report_activations(make_model, tmp_path: Path) -> None:
    model, out = make_model(vocab_size=2048), tmp_path / "out"
    for path in (EXAMPLES / "model").glob("tokenizer*"):
        shutil.copyfile(path, model / path.name)
    calibration = Calibration(str(EXAMPLES / "text" / "calibration.txt"), num_samples=2, max_seq_length=64)
    convert(Options(str(model), out, recipe="fast", calibration=calibration, text_samples=1))
    report = json.loads((out / REPORT_FILE).read_text())
    changes = report["statistics"]["activations"]
    assert list(changes) == list(report["traces"])
    for change in changes.values():
        assert 1 < change["after"]["peak"] <= change["after"]["peak_p99"]
        assert sum(change["before"]["histogram"]) + change["before"]["outside"] == pytest.approx(1, abs=1e-4)
    page = (out / PAGE_FILE).read_text()
    check_page(page)
    assert "input of down_proj" in page
    assert len(report["samples"]) == 1


def test_the_page_is_complete_and_shows_every_linear(report: dict, example_bwla: Path) -> None:
    page = (example_bwla / PAGE_FILE).read_text()
    checker = check_page(page)
    assert checker.counts["details"] == 4
    # A panel for each of 7 kinds and each of 28 linears, and charts of errors, objective and two figures.
    assert checker.counts["svg"] == 7 + 28 + 4
    for linear in report["linears"]:
        assert f"<td>{linear['name']}</td>" in page
        assert f"{linear['error']:.4f}" in page


def test_samples_are_greedy_continuations_of_both_or_a_reason(report: dict, example_bwla: Path) -> None:
    assert [sample["prompt"] for sample in report["samples"]] == list(PROMPTS[:3])
    for key, folder in (("original", EXAMPLES / "model"), ("bwla", example_bwla)):
        assert complete(folder, PROMPTS[:1]) == [report["samples"][0][key]]
    page = render_page({**report, "samples": [], "no_samples": "the model has no tokenizer"})
    assert "No samples: the model has no tokenizer." in page


def test_samples_that_fail_do_not_stop_a_conversion(report: dict, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    result = add_samples(report, tmp_path, tmp_path, 1)
    assert result["samples"] == []
    assert result["no_samples"].startswith("generating them failed")


def test_what_comes_from_outside_is_escaped(report: dict) -> None:
    report["provenance"]["base_model"] = "<script>alert(1)</script>"
    report["samples"] = [{"prompt": "a<b>", "original": "<img src=x>", "bwla": "& so on"}]
    page = render_page(report)
    check_page(page)
    assert "&lt;img src=x&gt;" in page


def test_each_objective_of_the_rotations_has_a_chart_of_its_own(report: dict) -> None:
    assert {objective for trace in report["traces"].values() for objective in trace} >= {"okt"}
    one = render_page(report)
    check_page(one)
    first = next(iter(report["traces"]))
    both = render_page({**report, "traces": {**report["traces"], first: {"moment": [9.5, 7.5]}}})
    check_page(both)
    assert "nats per weight" in both
    assert ("Fifth absolute moment" in one, "Fifth absolute moment" in both) == (False, True)
    assert ("mean |w|^5" in one, "mean |w|^5" in both) == (False, True)


def test_a_report_without_statistics_still_has_a_page(report: dict) -> None:
    page = render_page({**report, "statistics": {}, "traces": {}})
    check_page(page)
    assert "Weights before and after" not in page
    assert "Error of each linear" in page


def test_without_report(make_model, tmp_path: Path) -> None:
    convert(Options(str(make_model()), tmp_path / "out", report=False, recipe="data-free"))
    assert not (tmp_path / "out" / PAGE_FILE).exists()
    assert "bwla_report.html" not in (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["statistics"] == {"weights": {}, "activations": {}}
    assert len(report["linears"]) == 14


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("wikitext2", "is the training split of WikiText-2"),
        ("wiki.train.raw", "wiki.train.raw, is text of WikiText-2 by its name"),
        ("wikitext2_valid.txt", "wikitext2_valid.txt, is text of WikiText-2 by its name"),
        ("texts/WikiText-2-test.jsonl", "WikiText-2-test.jsonl, is text of WikiText-2 by its name"),
        ("wikitext2/novels.txt", None),
        ("c4", None),
        ("novels.txt", None),
        (None, None),
    ],
)
def test_calibrating_on_an_evaluation_set_gives_a_warning_that_is_true(
    source: str | None, says: str | None
) -> None:
    warning = calibration_warning({"source": source} if source else {})
    assert (warning is not None) == (says is not None)
    if warning and says:
        assert says in warning
        assert ("training split" in warning) == (source == "wikitext2")


def test_the_json_reads_back_and_is_short(report: dict) -> None:
    text = report_json(report)
    assert json.loads(text) == report
    assert len(text.splitlines()) < 250


def test_samples_are_made_where_that_is_cheap_or_asked_for(tmp_path: Path) -> None:
    assert samples_problem(EXAMPLES / "model", 10**6, None) is None
    assert samples_problem(EXAMPLES / "model", 10**10, 2) is None
    assert "--samples-of-text" in str(samples_problem(EXAMPLES / "model", 10**10, None))
    assert samples_problem(EXAMPLES / "model", 10**6, 0) == "not requested"
    assert samples_problem(tmp_path, 10**6, 3) == "the model has no tokenizer"
