"""Calibration text that the model writes itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bwla_converter.calibration import self_text as module
from bwla_converter.calibration.generation import Script, sample_sequences
from bwla_converter.calibration.self_text import (
    MARK,
    Writing,
    choose_dtype,
    conversation_parts,
    end_tokens,
    make_scripts,
    text_lines,
    write_calibration,
)
from bwla_converter.calibration.text import calibration_samples, held_out_samples, load_tokenizer
from bwla_converter.options import Calibration
from bwla_converter.source.model import Source, open_source
from bwla_kernels.errors import SourceError
from paths import EXAMPLE
from transformers import AutoModelForCausalLM

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """The example with a chat template."""
    folder = tmp_path / "chat"
    shutil.copytree(EXAMPLE, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


def writing(source: Source, seed: int = 0, memory: float = 1e12) -> Writing:
    return Writing(source.folder, Calibration("self", 3, 4096), seed, torch.device("cpu"), memory)


def short(source: Source, seed: int = 0) -> Writing:
    """Two samples and two more for the loss, of 16 tokens."""
    made = Writing(source.folder, Calibration("self", 2, 16), seed, torch.device("cpu"), 1e12)
    assert (made.samples, made.pieces, made.length) == (4, 1, 16)
    return made


def test_sampling_follows_the_distribution_of_the_model() -> None:
    """With a script of one token, the second token of many sequences has the model's probabilities."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE).eval()
    scripts = [Script([[7]]) for _ in range(4000)]
    ids = sample_sequences(model, scripts, 2, (set(), 2048), torch.Generator().manual_seed(1))
    assert ids.shape == (4000, 2)
    assert bool((ids[:, 0] == 7).all())
    with torch.no_grad():
        expected = model(torch.tensor([[7]])).logits[0, -1].float().softmax(-1)
    counted = ids[:, 1].bincount(minlength=2048) / 4000
    likely = expected.topk(5).indices
    assert torch.allclose(counted[likely], expected[likely], atol=0.03)


def test_scripts_are_put_in_turn_after_each_end_token() -> None:
    """All tokens end a text here, so that the script returns after each sampled token."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE).eval()
    script = Script([[1, 2], [3]])
    ids = sample_sequences(model, [script], 9, (range(2048), 2048), torch.Generator())
    assert ids[0, [0, 1, 3, 5, 6, 8]].tolist() == [1, 2, 3, 1, 2, 3]


def test_tokens_beyond_the_vocabulary_are_not_sampled() -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE).eval()
    ids = sample_sequences(model, [Script([[5]]) for _ in range(4)], 32, (set(), 40), torch.Generator())
    assert int(ids.max()) < 40


def test_the_same_seed_writes_the_same_text_once(cache: Path, tmp_path: Path) -> None:
    source = open_source(str(EXAMPLE))
    steps: list[tuple[int, int]] = []
    file = write_calibration(source, short(source), lambda step, total: steps.append((step, total)))
    assert file.is_relative_to(cache)
    assert steps[-1] == (16, 16)
    assert write_calibration(source, short(source), lambda *_: pytest.fail("written again")) == file
    calibration = Calibration("self", 2, 16, file)
    samples, digest = calibration_samples(calibration, EXAMPLE, seed=0)
    assert samples.shape == (2, 16)
    held_out = held_out_samples(calibration, EXAMPLE, seed=0, tokens=32)
    assert held_out is not None
    assert held_out.shape == (2, 16)
    file.unlink()
    again = Calibration("self", 2, 16, write_calibration(source, short(source), lambda *_: None))
    assert torch.equal(calibration_samples(again, EXAMPLE, seed=0)[0], samples)
    assert calibration_samples(again, EXAMPLE, seed=0)[1] == digest
    other = Calibration("self", 2, 16, write_calibration(source, short(source, seed=1), lambda *_: None))
    assert calibration_samples(other, EXAMPLE, seed=0)[1] != digest


@pytest.mark.parametrize(
    ("products", "memory", "expected"),
    [
        (torch.float32, 1e12, torch.float32),
        (torch.float32, 12e6, torch.bfloat16),  # The model has 2 million parameters, 8 MB in float32.
        (torch.bfloat16, 1e12, torch.bfloat16),
    ],
)
def test_a_model_writes_in_float32_where_that_is_faster_and_fits(
    products: torch.dtype, memory: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "product_dtype", lambda device: products)
    source = open_source(str(EXAMPLE))
    assert next(iter(source.entries.values())).dtype == torch.bfloat16
    assert choose_dtype(source, writing(source, memory=memory)) == expected


def test_long_samples_are_put_together_from_several_sequences(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST", 8)
    monkeypatch.setattr(module, "held_out_tokens", lambda calibration: 20)
    source = open_source(str(EXAMPLE))
    made = Writing(source.folder, Calibration("self", 3, 20), 0, torch.device("cpu"), 1e12)
    assert (made.samples, made.pieces, made.length) == (4, 3, 7)
    steps: list[tuple[int, int]] = []
    file = write_calibration(source, made, lambda step, total: steps.append((step, total)))
    assert steps[-1] == (7, 7)
    samples, _ = calibration_samples(Calibration("self", 3, 20, file), EXAMPLE, 0)
    assert samples.shape == (3, 20)
    assert len({tuple(row.tolist()) for row in samples}) == 3


def test_a_changed_model_writes_again(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EXAMPLE, folder)
    before = short(open_source(str(folder))).cache_file()
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert short(open_source(str(folder))).cache_file() != before


def test_every_other_sequence_is_a_conversation_where_there_is_a_template(chat_model: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    ends = end_tokens(tokenizer, AutoModelForCausalLM.from_pretrained(chat_model))
    parts = conversation_parts(tokenizer, ends)
    assert parts is not None
    assert tokenizer.decode(parts[0]) == tokenizer.bos_token + "[user] "
    assert tokenizer.decode(parts[1]) == "[assistant] "
    scripts = make_scripts(tokenizer, ends, 4, torch.Generator())
    assert [script.parts == parts for script in scripts] == [False, True, False, True]
    plain = load_tokenizer(EXAMPLE)
    assert conversation_parts(plain, ends) is None
    assert all(len(script.pending) <= 2 for script in make_scripts(plain, ends, 4, torch.Generator()))


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "nothing of the message", "{{ 1 / 0 }}"])
def test_a_template_that_cannot_be_used_means_no_conversations(chat_model: Path, template: str) -> None:
    tokenizer = load_tokenizer(chat_model)
    tokenizer.chat_template = template
    assert conversation_parts(tokenizer, {0}) is None
    assert MARK not in "".join(template)


def test_the_text_can_be_read_as_calibration_text(cache: Path, tmp_path: Path) -> None:
    source = open_source(str(EXAMPLE))
    calibration = Calibration("self", 2, 16, write_calibration(source, short(source), lambda *_: None))
    (tmp_path / "text.jsonl").write_text("\n".join(text_lines(calibration, source.folder)))
    samples, _ = calibration_samples(Calibration(str(tmp_path / "text.jsonl"), 4, 16), EXAMPLE, 0)
    assert samples.shape == (4, 16)


def test_a_model_that_does_not_fit_into_memory_is_refused(cache: Path) -> None:
    source = open_source(str(EXAMPLE))
    with pytest.raises(
        SourceError,
        match=r"--calibration self: expected [\d.]+ MB of memory for model, .* found 1.0 MB: give",
    ):
        write_calibration(source, writing(source, memory=1e6), lambda *_: None)
    assert not list(cache.rglob("*.safetensors"))
