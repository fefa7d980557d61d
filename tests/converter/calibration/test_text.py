"""Calibration text: what is read, which samples are cut from it, and what is refused."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from bwla_converter.calibration.text import (
    calibration_samples,
    dataset_text,
    held_out_samples,
    read_texts,
)
from bwla_converter.options import Calibration
from bwla_kernels.errors import SourceError
from paths import EXAMPLE


def test_files_folders_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("first")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("third", "fourth")))
    (tmp_path / "other.md").write_text("not this")
    assert list(read_texts(tmp_path)) == ["first", "second", "third", "fourth"]
    assert list(read_texts(tmp_path / "b.txt")) == ["second"]


def test_errors_name_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected a file or a folder with .txt or .jsonl"):
        list(read_texts(tmp_path / "nothing"))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": "no"}\n')
    with pytest.raises(SourceError, match=r"bad.jsonl, line 2: expected an object with a \"text\""):
        list(read_texts(tmp_path / "bad.jsonl"))


def test_samples_are_pieces_of_the_text_chosen_by_the_seed(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = " ".join(f"word {i} of many" for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    calibration = Calibration(str(tmp_path / "text.txt"), num_samples=5, max_seq_length=32)
    samples, digest = calibration_samples(calibration, EXAMPLE, seed=1)
    assert samples.shape == (5, 32)
    whole = AutoTokenizer.from_pretrained(EXAMPLE)(text, return_tensors="pt").input_ids[0]
    pieces = whole.unfold(0, 32, 1)
    assert all(bool((pieces == sample).all(1).any()) for sample in samples)
    again, same = calibration_samples(calibration, EXAMPLE, seed=1)
    assert torch.equal(samples, again)
    assert digest == same
    assert not torch.equal(samples, calibration_samples(calibration, EXAMPLE, seed=2)[0])


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words")
    with pytest.raises(SourceError, match=r"expected at least 64 tokens \(--max-seq-length\), found"):
        calibration_samples(Calibration(str(tmp_path / "text.txt"), max_seq_length=64), EXAMPLE, 0)


def test_a_dataset_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(
        SourceError,
        match="dataset wikitext2: (expected the datasets library|the dataset cannot be downloaded)",
    ):
        dataset_text("wikitext2")


def test_the_rows_of_a_dataset_are_joined_by_an_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPTQ's script and its successors join WikiText-2, so that perplexities can be compared."""
    library = types.ModuleType("datasets")
    library.load_dataset = lambda **_: iter([{"text": "one\n"}, {"text": ""}, {"text": "two\n"}])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert dataset_text("wikitext2-test") == "one\n\n\n\n\ntwo\n"


def test_held_out_samples_do_not_overlap_with_the_others(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(str(number) for number in range(1000, 3000)))
    calibration = Calibration(str(tmp_path / "text.txt"), num_samples=6, max_seq_length=32)
    samples, _ = calibration_samples(calibration, EXAMPLE, seed=1)
    held_out = held_out_samples(calibration, EXAMPLE, seed=1, tokens=200)
    assert held_out is not None
    assert held_out.shape == (6, 32)
    used = {tuple(part.tolist()) for part in samples.unfold(1, 12, 1).flatten(0, 1)}
    assert not used & {tuple(part.tolist()) for part in held_out.unfold(1, 12, 1).flatten(0, 1)}
    everything = Calibration(str(tmp_path / "text.txt"), num_samples=4000, max_seq_length=32)
    assert held_out_samples(everything, EXAMPLE, seed=1, tokens=200) is None
