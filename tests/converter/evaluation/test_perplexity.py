"""Perplexity equals its formula and does not depend on the batch size."""

import pytest
import torch
from bwla_converter.evaluation.perplexity import Perplexity, perplexity, windows_of
from bwla_kernels.errors import SourceError
from transformers import AutoModelForCausalLM


def test_text_is_cut_into_whole_windows() -> None:
    assert windows_of(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(SourceError, match="expected at least 8 tokens of text, found 7: use a longer text"):
        windows_of(torch.arange(7), 8)


def test_it_is_the_exponential_of_the_mean_loss(make_model) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(), dtype=torch.float32).eval()
    windows = torch.arange(30).view(3, 10)
    with torch.no_grad():
        losses = [model(row.unsqueeze(0), labels=row.unsqueeze(0)).loss for row in windows]
    done: list[int] = []
    value = perplexity(model, windows, batch=2, on_batch=done.append)
    assert value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert value == pytest.approx(perplexity(model, windows, batch=1), rel=1e-5)
    assert done == [2, 1]


def test_the_ratio() -> None:
    assert str(Perplexity(10.0, 12.5)) == "perplexity 10.00 -> 12.50 (x 1.250)"
