"""Models of one bit and three values are served: a file of type Q1_0 and a BitNet checkpoint, from file to tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from few_values import bitnet_model, few_values, write_bitnet
from gguf_models import write_gguf
from greedy import PROMPT, answer
from transformers import AutoModelForCausalLM

TOKENS = 8
CLEAR_MARGIN = 0.3
"""Where the likeliest token leads by less, a code of 8 bits that rounds otherwise may choose the other one."""


def q1_0(folder: Path) -> Path:
    return write_gguf(folder / "model.gguf", few_values(tie_word_embeddings=True), "Q1_0")


def bitnet_llama(folder: Path) -> Path:
    """Falcon-E's form."""
    return write_bitnet(folder / "model", few_values("Llama", planes=2))


def bitnet(folder: Path) -> Path:
    """The form of BitNet b1.58 2B-4T, which vLLM serves with transformers' class."""
    return write_bitnet(folder / "model", bitnet_model(), "autobitlinear")


@pytest.mark.parametrize(
    ("write", "compiled"), [(q1_0, False), (q1_0, True), (bitnet_llama, False), (bitnet, False)]
)
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
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    # Before vLLM starts, which changes the class of a model that it runs itself.
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    sequence, clear = list(PROMPT), []
    with torch.no_grad():
        logprobs = model(torch.tensor([sequence])).logits.log_softmax(-1)[0]
        for _ in range(TOKENS):
            best = model(torch.tensor([sequence])).logits[0, -1].topk(2)
            sequence.append(int(best.indices[0]))
            clear.append(bool(best.values[0] - best.values[1] > CLEAR_MARGIN))
    tokens, tables = answer(start(out, skip_tokenizer_init=True, enforce_eager=not compiled), TOKENS)
    same = clear.index(False) if False in clear else TOKENS
    assert same >= 2
    assert tokens[:same] == sequence[len(PROMPT) : len(PROMPT) + same]
    for position, table in enumerate(tables):
        for token, value in table.items():
            assert value == pytest.approx(logprobs[position, token].item(), abs=1e-4)
