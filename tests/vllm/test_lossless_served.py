"""Models of one bit and three values are served: a file of type Q1_0 and a BitNet checkpoint, from file to tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from few_values import few_values, write_bitnet
from gguf_models import write_gguf
from greedy import PROMPT, answer
from transformers import AutoModelForCausalLM

TOKENS = 8


def q1_0(folder: Path) -> Path:
    return write_gguf(folder / "model.gguf", few_values(tie_word_embeddings=True), "Q1_0")


def bitnet(folder: Path) -> Path:
    return write_bitnet(folder / "model", few_values("Llama", planes=2))


@pytest.mark.parametrize(("write", "compiled"), [(q1_0, False), (q1_0, True), (bitnet, False)])
def test_vllm_answers_as_transformers_does(
    write: Callable[[Path], Path],
    compiled: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[..., Any],
) -> None:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    convert(Options(str(write(tmp_path)), out, device="cpu", threads=1, report=False, text_samples=0))
    tokens, tables = answer(start(out, skip_tokenizer_init=True, enforce_eager=not compiled), TOKENS)

    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        logprobs = model(prompt).logits.log_softmax(-1)[0]
    assert tokens == expected[0, len(PROMPT) :].tolist()
    for position, table in enumerate(tables):
        for token, value in table.items():
            assert value == pytest.approx(logprobs[position, token].item(), abs=1e-4)
