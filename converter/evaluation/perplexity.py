"""Perplexity, from one function for demo, tests and benchmarks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bwla_kernels.errors import SourceError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """Perplexities of an original and its BWLA version on the same windows."""

    original: float
    bwla: float

    @property
    def ratio(self) -> float:
        """BWLA's perplexity over the original's."""
        return self.bwla / self.original

    def __str__(self) -> str:
        return f"perplexity {self.original:.2f} -> {self.bwla:.2f} (x {self.ratio:.3f})"


def windows_of(ids: Tensor, window: int) -> Tensor:
    """Cut a token stream [T] into whole windows [T // window, window]; the rest is dropped.

    Raises:
        SourceError: the text is shorter than one window.
    """
    count = ids.numel() // window
    if count == 0:
        raise SourceError(
            f"expected at least {window} tokens of text, found {ids.numel()}: give a longer file"
        )
    return ids[: count * window].view(count, window)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    batch: int = 4,
    on_batch: Callable[[int], None] = lambda done: None,
) -> float:
    """exp of the mean next-token negative log likelihood over independent windows, as the papers do it.

    Args:
        model: a causal language model.
        windows: token ids [count, window]; each window predicts its tokens 1.. from those before.
        batch: windows at a time.
        on_batch: called with the number of windows done.
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
    """Perplexity of a model and of its BWLA checkpoint on the same windows of a text.

    Args:
        model: folder of the original.
        bwla: folder of the checkpoint that was made from it.
        text: what to predict.
        window: tokens a window.
        limit: windows to use at most.

    Raises:
        SourceError: the text is shorter than one window.
    """
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = windows_of(ids, window)[:limit]
    values = [
        perplexity(AutoModelForCausalLM.from_pretrained(folder).eval(), windows) for folder in (model, bwla)
    ]
    return Perplexity(*values)


def compare(model: Path, bwla: Path, text: Path, window: int = 512, limit: int | None = None) -> Perplexity:
    """`compare_texts` on a UTF-8 text file."""
    return compare_texts(model, bwla, text.read_text(encoding="utf-8"), window, limit)
