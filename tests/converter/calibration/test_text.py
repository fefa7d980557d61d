"""Calibration text: what is read, which samples are cut from it, and what is refused."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from bwla_converter.calibration.text import (
    MAX_HELD_OUT_TOKENS,
    calibration_samples,
    dataset_text,
    held_out_samples,
    held_out_tokens,
)
from bwla_converter.options import Calibration
from bwla_kernels.errors import SourceError
from paths import EXAMPLE


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


def test_a_tokenizer_with_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EXAMPLE, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    (tmp_path / "text.txt").write_text("the old man looked at the sea " * 20)
    calibration = Calibration(str(tmp_path / "text.txt"), num_samples=1, max_seq_length=32)
    with pytest.raises(
        SourceError, match="expected token ids below 100, .* the tokenizer belongs to another"
    ):
        calibration_samples(calibration, model, 0)


def test_the_loss_is_measured_on_as_many_tokens_as_calibrate_up_to_a_limit() -> None:
    assert held_out_tokens(Calibration("self", 16, 256)) == 4096
    assert held_out_tokens(Calibration("self", 128, 2048)) == MAX_HELD_OUT_TOKENS


def test_conversations_go_through_the_chat_template_with_one_bos_token(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EXAMPLE, model)
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    conversation = [{"role": "user", "content": "the sea " * 40}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": conversation}))
    (tmp_path / "same.txt").write_text(f"user: {'the sea ' * 40}\n")
    chat, same = (
        calibration_samples(Calibration(str(tmp_path / name), 2, 16), model, 0)[0]
        for name in ("chat.jsonl", "same.txt")
    )
    assert torch.equal(chat, same)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "the sea"}]}')
    with pytest.raises(
        SourceError, match="chat.jsonl, line 1, .*chat template cannot render this conversation"
    ):
        calibration_samples(Calibration(str(tmp_path / "chat.jsonl"), 1, 2), EXAMPLE, 0)
