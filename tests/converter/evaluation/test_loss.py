"""The loss measured layer by layer is that of the whole models."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter import hf  # noqa: F401 -- registers the format with transformers
from bwla_converter.evaluation import loss
from bwla_converter.evaluation.loss import measure_loss
from bwla_converter.evaluation.perplexity import perplexity
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.source.model import open_source
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize(("family", "head_bits"), [("Qwen3", 8), ("Llama", 16), ("Gemma 2", None)])
def test_the_loss_is_the_logarithm_of_the_perplexities_ratio(
    make_model, tmp_path: Path, family: str, head_bits: int | None
) -> None:
    model = make_model(family, dtype=torch.float32)
    convert(
        Options(str(model), tmp_path / "out", bits=16, head_bits=head_bits, report=False, recipe="data-free")
    )
    ids = torch.randint(0, 96, (5, 12), generator=torch.Generator().manual_seed(0))
    original, quantized = (
        perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
        for folder in (model, tmp_path / "out")
    )
    source = open_source(str(model), ())
    found = measure_loss(source, tmp_path / "out", ids, torch.device("cpu"))
    assert found == pytest.approx(math.log(quantized / original), abs=2e-3)


def test_the_originals_likelihood_is_measured_once_for_each_text(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("Qwen3")
    convert(Options(str(model), tmp_path / "out", report=False, recipe="data-free"))
    source, measured = open_source(str(model), ()), []
    likelihood = loss._negative_log_likelihood

    def counted(model: loss.StoredModel, *arguments: Any) -> float:
        measured.append("quantized" if model.specs else "original")
        return likelihood(model, *arguments)

    monkeypatch.setattr(loss, "_negative_log_likelihood", counted)
    texts = [torch.full((2, 6), 3), torch.full((2, 6), 3), torch.full((2, 6), 4), torch.full((3, 4), 3)]
    found = [measure_loss(source, tmp_path / "out", ids, torch.device("cpu")) for ids in texts]
    assert found[0] == found[1]
    assert measured == ["original", "quantized", "quantized", *2 * ["original", "quantized"]]
