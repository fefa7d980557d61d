"""The list of families, and recipe `fast` on every family."""

from pathlib import Path

import pytest
import torch
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_converter.source.families import FAMILIES
from bwla_converter.source.model import check_values, open_source
from bwla_kernels.errors import SourceError
from transformers import AutoModelForCausalLM


def test_no_two_families_claim_an_architecture() -> None:
    assert len({family.architecture for family in FAMILIES}) == len(FAMILIES)


def write_words(folder: Path) -> None:
    """Write a tokenizer of the words t0 .. t95 and a text of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder)
    ids = torch.randint(0, 96, (2000,), generator=torch.Generator().manual_seed(3)).tolist()
    (folder / "text.txt").write_text(" ".join(f"t{i}" for i in ids))


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_recipe_fast_converts_every_family(make_model, tmp_path: Path, family: str) -> None:
    """`test_layer_runner.py` compares the inputs of the linears with those in the whole model."""
    folder, out = make_model(family, lively=True), tmp_path / "out"
    write_words(folder)
    text = Calibration(str(folder / "text.txt"), num_samples=4, max_seq_length=16)
    summary = convert(Options(str(folder), out, rank=2, recipe="fast", calibration=text))
    assert all(0.05 < layer.error < 1.0 for layer in summary.linears)
    ids = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits).all()


def test_a_separate_head_is_refused_if_vllm_does_not_support_it(make_model, tmp_path: Path) -> None:
    for options, config in (({"head_bits": 8}, {}), ({}, {"tie_word_embeddings": False})):
        folder = make_model("Gemma 2", **config)
        with pytest.raises(
            SourceError, match="vLLM always uses the embedding as the head of Gemma2ForCausalLM"
        ):
            convert(Options(str(folder), tmp_path / "out", recipe="data-free", **options))
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_is_stored_with_other_values(make_model, edit) -> None:
    """Loaders would ignore it silently."""
    folder = make_model()
    edit.json(folder / "config.json", tie_word_embeddings=True)
    source = open_source(str(folder))
    with pytest.raises(
        SourceError, match=r"lm_head.weight differs from model.embed_tokens.weight, to which config.json"
    ):
        check_values(source)


def test_an_architecture_of_another_model_type(make_model, edit) -> None:
    folder = make_model()
    edit.json(folder / "config.json", architectures=["LlamaForCausalLM"])
    with pytest.raises(SourceError, match="expected the model_type of LlamaForCausalLM, llama, found qwen3"):
        open_source(str(folder))
