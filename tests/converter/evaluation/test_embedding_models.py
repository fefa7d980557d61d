"""Models without a language-model head are converted for the cosine between their final hidden states."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from any_model import build_any_model, write_any_model
from bwla_converter.allocation.sensitivity import measure_sensitivities
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.evaluation.loss import measure_loss
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_converter.planning.plan import make_plan
from bwla_converter.source.model import Source
from bwla_kernels.errors import SourceError
from bwla_kernels.format.schema import Provenance
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

CPU = torch.device("cpu")
ENCODER: dict[str, Any] = {"drop": ("num_key_value_heads", "head_dim")}
KINDS: dict[str, dict[str, Any]] = {
    "a decoder": {"architecture": "Qwen3Model", "model_type": "qwen3"},
    "an encoder": {"architecture": "BertModel", "model_type": "bert", **ENCODER},
    "an encoder with rotary embeddings": {
        "architecture": "ModernBertModel",
        "model_type": "modernbert",
        "local_attention": 8,
        "cls_token_id": 1,
        "sep_token_id": 2,
        **ENCODER,
    },
}


def write(kind: str, folder: Path) -> tuple[PreTrainedModel, Source]:
    model = build_any_model(**KINDS[kind])
    return model, write_any_model(model, folder)


def token_ids(count: int) -> Tensor:
    return torch.randint(3, 96, (count, 24), generator=torch.Generator().manual_seed(1))


def distance(states: Tensor, others: Tensor) -> float:
    return float((1 - torch.cosine_similarity(states.double(), others.double(), dim=-1)).mean())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_measured_loss_is_the_cosine_distance_of_the_whole_models(kind: str, tmp_path: Path) -> None:
    model, source = write(kind, tmp_path / "model")
    out = tmp_path / "out"
    convert(Options(str(tmp_path / "model"), out, bits=16, report=False, recipe="data-free"))
    write_dequantized(out, tmp_path / "dequantized", "float32")
    quantized = AutoModel.from_pretrained(tmp_path / "dequantized").eval()
    ids = token_ids(5)
    expected = distance(model(ids).last_hidden_state, quantized(ids).last_hidden_state)
    assert expected > 0.01
    assert measure_loss(source, out, ids, CPU) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_independent_errors_of_inputs_change_the_cosine_as_predicted(kind: str, tmp_path: Path) -> None:
    model, source = write(kind, tmp_path)
    specs = dict(make_plan(source, 0, 6, 1.0, Provenance()).specs)
    ids, variance, repeats = token_ids(48), 1e-4, 6
    found = measure_sensitivities(source, specs, ids, 0, ActivationStore())
    *_, (_, members) = source.groups_of_layer(0)  # the last linear of the MLP, whose noise is independent
    generator = torch.Generator().manual_seed(0)

    def add_noise(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rms = args[0].square().mean(-1, keepdim=True).sqrt()
        return (args[0] + variance**0.5 * rms * torch.randn(args[0].shape, generator=generator),)

    with torch.no_grad():
        before = model(ids).last_hidden_state
        module = model.get_submodule(source.structure.module_path(members[0]))
        handle = module.register_forward_pre_hook(add_noise)
        measured = sum(distance(before, model(ids).last_hidden_state) for _ in range(repeats)) / repeats
        handle.remove()
    assert variance * found[members[0]].inputs == pytest.approx(measured, rel=0.15)


def test_text_is_asked_for_and_distillation_is_refused(tmp_path: Path) -> None:
    _, source = write("an encoder", tmp_path / "model")
    options = Options(str(source.folder), tmp_path / "out", report=False)
    with pytest.raises(SourceError, match="BertModel has no language-model head to write its own"):
        convert(options)
    text = Calibration("wikitext2", num_samples=2, max_seq_length=16)
    with pytest.raises(SourceError, match="BertModel, which has none: use recipe fast"):
        convert(replace(options, recipe="best", calibration=text))
