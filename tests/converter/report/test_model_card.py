"""The card's metadata is what the Hub reads, its words are true, and figures come in where they belong."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from bwla_converter.checkpoint.contents import read_contents
from bwla_converter.checkpoint.integrity import check_hashes
from bwla_converter.cli.convert import app
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.report.model_card import CARD_FILE, add_evaluation, command, model_card, source_metadata
from bwla_kernels.errors import FormatError, SourceError
from huggingface_hub import ModelCard
from typer.testing import CliRunner

SOURCE_CARD = """---
license: other
license_name: my-license
license_link: https://example.com/license
language:
- en
tags:
- theirs
datasets:
- secret
---
# Theirs
"""


@pytest.fixture
def out(example_bwla: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(example_bwla, tmp_path / "out"))


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    data = {
        "text": "books/held.txt",
        "window": 512,
        "results": {"perplexity": {"original": 10.0, "bwla": 12.5}},
    }
    path.write_text(json.dumps(data))
    return path


def test_metadata_for_the_hub(out: Path, tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text(SOURCE_CARD)
    (out / CARD_FILE).write_text(model_card(read_contents(out), source_metadata(tmp_path)))
    data = ModelCard.load(out / CARD_FILE).data.to_dict()
    assert data["library_name"] == "vllm"
    assert {"bwla", "1-bit", "vllm"} <= set(data["tags"])
    assert data["pipeline_tag"] == "text-generation"
    assert (data["license"], data["license_name"]) == ("other", "my-license")
    assert data["license_link"] == "https://example.com/license"
    # A folder is no model of the Hub, and what else their card says is about their model.
    assert "base_model" not in data
    assert "datasets" not in data
    assert "theirs" not in data["tags"]


def test_a_model_of_the_hub_is_named_as_the_base(out: Path) -> None:
    contents = read_contents(out)
    provenance = contents.format.provenance.model_copy(
        update={"base_model": "Qwen/Qwen3-8B", "revision": "abc"}
    )
    contents = type(contents)(
        contents.folder, contents.format.model_copy(update={"provenance": provenance}), contents.specs,
        contents.entries, contents.bits, contents.bytes,
    )  # fmt: skip
    card = ModelCard(model_card(contents, {}, "me/qwen-bwla"))
    assert card.data.to_dict()["base_model"] == "Qwen/Qwen3-8B"
    assert card.data.to_dict()["base_model_relation"] == "quantized"
    assert "vllm serve me/qwen-bwla --quantization bwla" in card.text
    assert "licence is that of the base model" in card.text


def test_the_card_says_what_was_made(out: Path) -> None:
    text = (out / CARD_FILE).read_text()
    contents = read_contents(out)
    assert f"{contents.bits_per_weight:.4f} bits each" in text
    assert "1-bit weights and 6-bit activations" in text
    assert "low-rank correction of rank 1" in text
    assert "head is 8-bit" in text
    assert str(out) not in text


def test_the_command_makes_the_same_checkpoint_again(make_model, tmp_path: Path) -> None:
    folder, out = make_model(), tmp_path / "out"
    (folder / CARD_FILE).write_text(SOURCE_CARD)
    ignored = ("re:.*[.]0[.]mlp[.]down_proj",)
    convert(
        Options(
            str(folder),
            out,
            rank=2,
            bits=8,
            clip=0.9,
            seed=3,
            ignore=ignored,
            report=False,
            recipe="data-free",
        )
    )
    assert ModelCard.load(out / CARD_FILE).data.to_dict()["license_name"] == "my-license"
    words = shlex.split(command(read_contents(out)))
    assert words[:3] == ["bwla-convert", "model", "OUT"]
    again = tmp_path / "again"
    done = CliRunner().invoke(app, [str(tmp_path / "model"), str(again), *words[3:], "--no-report"])
    assert done.exit_code == 0, done.output
    assert (again / "bwla_hashes.json").read_bytes() == (out / "bwla_hashes.json").read_bytes()


def test_a_card_that_cannot_be_read_is_no_reason_to_stop(tmp_path: Path) -> None:
    assert source_metadata(tmp_path) == {}
    (tmp_path / CARD_FILE).write_text("---\nlicense: [unclosed\n---\n")
    assert source_metadata(tmp_path) == {}
    (tmp_path / CARD_FILE).write_text("# no metadata\n")
    assert source_metadata(tmp_path) == {}


def test_figures_take_their_place_and_replace_older_ones(out: Path, evaluation: Path) -> None:
    add_evaluation(out, evaluation)
    first = (out / CARD_FILE).read_text()
    assert "| perplexity | 10 | 12.5 |" in first
    assert first.index("## How it was made") < first.index("## Evaluation") < first.index("## Limits")
    results = ModelCard.load(out / CARD_FILE).data.to_dict()["model-index"][0]["results"][0]
    assert results["metrics"] == [{"type": "perplexity", "value": 12.5}]
    assert results["dataset"]["name"] == "held.txt"
    evaluation.write_text(evaluation.read_text().replace("12.5", "11.5"))
    add_evaluation(out, evaluation)
    assert (out / CARD_FILE).read_text() == first.replace("12.5", "11.5")
    verdict = check_hashes(out)
    assert verdict is not None
    assert (verdict.intact, verdict.edited) == (True, [])


@pytest.mark.parametrize("content", ["{}", '{"results": {"a": 3}}', '{"results": {"a": {"original": 1}}}'])
def test_figures_of_another_kind_are_refused(out: Path, evaluation: Path, content: str) -> None:
    evaluation.write_text(content)
    with pytest.raises(SourceError, match="give a file that bwla-eval --out wrote"):
        add_evaluation(out, evaluation)


def test_a_card_without_the_place_for_figures(out: Path, evaluation: Path) -> None:
    (out / CARD_FILE).write_text("my own card")
    with pytest.raises(FormatError, match="add the two lines where the results should go"):
        add_evaluation(out, evaluation)
