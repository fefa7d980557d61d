"""Classes of transformers with another head than the language model's, on converted checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from bwla_converter.hf import modules as hf
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels.errors import FormatError
from bwla_kernels.format.folder import read_folder
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

IDS = torch.arange(24).view(1, 24)
LABELS = 3


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_classifier_reads_the_language_models_hidden_state(make_model, tmp_path: Path, tied: bool) -> None:
    """As in any language model that is loaded so, the classifier is new; everything below it is the checkpoint's."""
    out = tmp_path / "out"
    convert(Options(str(make_model("Qwen3", tie_word_embeddings=tied)), out, rank=2, recipe="data-free"))
    language = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(
        out, dtype=torch.float32, num_labels=LABELS, pad_token_id=0
    ).eval()
    assert classifier.score.weight.shape[0] == LABELS
    assert any(isinstance(module, hf.BWLALinear) for module in classifier.modules())
    hidden = language.model(IDS).last_hidden_state
    torch.testing.assert_close(classifier(IDS).logits, classifier.score(hidden[:, -1]))
    tagger = AutoModelForTokenClassification.from_pretrained(
        out, dtype=torch.float32, num_labels=LABELS
    ).eval()
    torch.testing.assert_close(tagger(IDS).logits, tagger.score(hidden))


def test_a_damaged_checkpoint_is_refused_with_any_head(make_model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(Options(str(make_model("Qwen3")), out, rank=2, recipe="data-free"))
    (file,) = {entry.file for name, entry in read_folder(out).items() if name == "model.norm.weight"}
    tensors = load_file(out / file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    save_file(tensors, out / file)
    with pytest.raises(FormatError, match=r"model.norm.weight: expected shape \[64\], found \[63\]"):
        AutoModelForSequenceClassification.from_pretrained(out, num_labels=LABELS)
    # What config.json says of the stored model is compared with the stored model, not with the requested class.
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
