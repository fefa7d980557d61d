"""Perplexity of a model on text; the demo, the tests, `bwla-eval` and the benchmarks all use this module."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bwla_converter.calibration.text import load_tokenizer, tokenize
from bwla_converter.calibration.text_files import read_text
from bwla_kernels.errors import SourceError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """Perplexities of the original model and of its BWLA checkpoint on the same text."""

    original: float
    bwla: float

    @property
    def ratio(self) -> float:
        """Perplexity of the BWLA checkpoint divided by that of the original."""
        return self.bwla / self.original

    def __str__(self) -> str:
        return f"perplexity {self.original:.2f} -> {self.bwla:.2f} (x {self.ratio:.3f})"


def windows_of(ids: Tensor, window: int) -> Tensor:
    """Split token ids [T] into consecutive windows [T // window, window]; the remainder is dropped.

    Raises:
        SourceError: the text is shorter than one window.
    """
    count = ids.numel() // window
    if count == 0:
        raise SourceError(
            f"expected at least {window} tokens of text, found {ids.numel()}: use a longer text or a shorter window"
        )
    return ids[: count * window].view(count, window)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch: int = 4,
    on_batch: Callable[[int], None] = lambda done: None,
) -> float:
    """Return exp of the mean negative log-likelihood of the next token, over independent windows, as papers report it.

    Args:
        model: a causal language model.
        windows: token ids [count, window]; every token but the first of a window is predicted from those before it.
        batch: number of windows in a batch.
        on_batch: called after each batch with its number of windows.
    """
    total, count = 0.0, 0
    for rows in windows.split(batch):
        logits = model(rows.to(model.device)).logits[:, :-1].float()
        targets = rows[:, 1:].to(model.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        total += loss.item()
        count += targets.numel()
        on_batch(len(rows))
    return math.exp(total / count)


def compare_texts(model: Path, bwla: Path, text: str, window: int, limit: int | None = None) -> Perplexity:
    """Measure the perplexity of a model and of its BWLA checkpoint on the same text.

    Args:
        model: folder of the original.
        bwla: folder of the checkpoint that was converted from it.
        text: the text to predict.
        window: tokens per window.
        limit: maximum number of windows; None for all.

    Raises:
        SourceError: the text is shorter than one window, the tokenizer cannot be used or belongs to another model, or
            a model lacks tensors.
    """
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    ids = tokenize(load_tokenizer(model), [text], model, "the evaluation text")
    windows = windows_of(ids, window)[:limit]
    return Perplexity(*(perplexity(load_whole(folder), windows) for folder in (model, bwla)))


def load_whole(folder: Path) -> PreTrainedModel:
    """Load a model with transformers.

    Raises:
        SourceError: the folder lacks some of its tensors, for which transformers would draw random values.
    """
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing:
        raise SourceError(
            f"{folder}: expected all tensors of {type(model).__name__} by their names, found {len(missing)} missing, "
            f"like {missing[0]}: save the model with transformers, without a wrapper around it"
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def compare(model: Path, bwla: Path, text: Path, window: int = 512, limit: int | None = None) -> Perplexity:
    """Call `compare_texts` with the contents of a text file."""
    return compare_texts(model, bwla, read_text(text, "--text"), window, limit)
