"""A few short completions of an original and of its BWLA version, for a reader's own impression."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from bwla_kernels.errors import SourceError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PROMPTS = (
    "The old man looked at the sea and",
    "The most important thing to know about water is",
    "Once upon a time there was a",
    "In the morning the two brothers",
    "The answer to the question was",
    "There are three reasons why",
    "She opened the letter and read:",
    "The road to the city",
)
NEW_TOKENS = 32
SMALL_MODEL = 2**28
"""Bytes of a model whose completions cost seconds and no memory to speak of, so that they are made unasked."""
UNASKED = 3


@dataclass(frozen=True)
class Sample:
    """One prompt with both greedy continuations."""

    prompt: str
    original: str
    bwla: str


def samples_problem(model: Path, model_bytes: int, wanted: int | None) -> str | None:
    """Why no samples are made of a model, in words; None where they are.

    Args:
        model: folder of the original.
        model_bytes: its size.
        wanted: how many were asked for; None where that was left open.
    """
    if wanted == 0:
        return "not asked for"
    if not any(model.glob("tokenizer*")):
        return "the model has no tokenizer"
    if wanted is None and model_bytes > SMALL_MODEL:
        return f"a model of {model_bytes / 1e9:.1f} GB is run only when --samples-of-text asks for it"
    return None


@contextmanager
def _no_bars() -> Iterator[None]:
    """The converter draws bars of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def complete(folder: Path, prompts: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[str]:
    """Greedy continuations by transformers on the CPU, one prompt after the other; the whole model is in memory.

    Raises:
        SourceError: the tokenizer makes nothing of a prompt.
    """
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with _no_bars():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        start = inputs.input_ids.shape[1]
        if start == 0:
            raise SourceError(f"{folder}: its tokenizer makes no tokens of {prompt!r}: check tokenizer.json")
        ids = model.generate(
            **inputs.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    return texts


def make_samples(model: Path, bwla: Path, count: int) -> list[Sample]:
    """The first `count` prompts, continued by the model in `model` and by the checkpoint in `bwla`."""
    prompts = PROMPTS[:count]
    pairs = zip(prompts, complete(model, prompts), complete(bwla, prompts), strict=True)
    return [Sample(*texts) for texts in pairs]
