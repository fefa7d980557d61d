"""Other heads than the language model's in vLLM: embeddings, classifiers, rerankers, and overrides of the config."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels.format.model import config_values
from bwla_kernels.format.schema import BWLAFormat, head_args
from golden import load_reference

from benchmarks.common.tiny_models import write_model
from bwla_vllm.checks import changed_sizes
from bwla_vllm.errors import StartError
from bwla_vllm.loading import check_derived_head, check_request, ties_embeddings

NO, YES = 3, 7
RERANKER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": [f"t{NO}", f"t{YES}"],
    "is_original_qwen3_reranker": True,
}
"""vLLM's documented recipe for Qwen3-Reranker, with two tokens of the tests' tokenizer."""

POOLING = {"runner": "pooling"}


@torch.no_grad()
def test_a_reranker_scores_with_two_rows_of_the_head(
    qwen3: Any, golden: Any, start: Callable[..., Any]
) -> None:
    engine = start(qwen3.folder, hf_overrides=RERANKER, **POOLING)
    (found,) = engine.classify([{"prompt_token_ids": golden.prompt}], use_tqdm=False)
    logits = golden.logprobs[len(golden.prompt) - 1]
    assert found.outputs.probs == pytest.approx([torch.sigmoid(logits[YES] - logits[NO]).item()], abs=1e-4)


@torch.no_grad()
def test_a_reranker_with_a_head_tied_to_the_8_bit_embedding(
    start: Callable[..., Any], tokenizer: Callable[[Path], None], tmp_path: Path
) -> None:
    """As bwla-convert writes Qwen3-Reranker-0.6B by default."""
    source, out, prompt = tmp_path / "source", tmp_path / "out", [1, 2, 3, 4, 5]
    ids = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 255}
    write_model(source, "Qwen3", dtype=torch.float32, lively=True, tie_word_embeddings=True, **ids)
    tokenizer(source)
    convert(Options(str(source), out, rank=2, bits=16, recipe="data-free"))
    assert "embedding" in json.loads((out / "config.json").read_text())["quantization_config"]
    logits = load_reference(out)(torch.tensor([prompt])).logits[0, -1]
    engine = start(out, hf_overrides=RERANKER, **POOLING)
    (found,) = engine.classify([{"prompt_token_ids": prompt}], use_tqdm=False)
    assert found.outputs.probs == pytest.approx([torch.sigmoid(logits[YES] - logits[NO]).item()], abs=1e-4)
    assert abs(found.outputs.probs[0] - 0.5) > 1e-2


@torch.no_grad()
def test_embeddings_are_the_last_hidden_state(qwen3: Any, golden: Any, start: Callable[..., Any]) -> None:
    engine = start(qwen3.folder, convert="embed", **POOLING)
    (found,) = engine.embed([{"prompt_token_ids": golden.prompt}], use_tqdm=False)
    hidden = qwen3.model.model(torch.tensor([golden.prompt])).last_hidden_state[0, -1]
    torch.testing.assert_close(
        torch.tensor(found.outputs.embedding),
        torch.nn.functional.normalize(hidden, dim=0),
        rtol=1e-3,
        atol=1e-4,
    )


@torch.no_grad()
def test_embeddings_of_a_checkpoint_with_an_8_bit_head(example_bwla: Path, start: Callable[..., Any]) -> None:
    """The head is in the files, but not in the model that vLLM builds."""
    tokens = list(range(10, 20))
    engine = start(example_bwla, convert="embed", **POOLING)
    (found,) = engine.embed([{"prompt_token_ids": tokens}], use_tqdm=False)
    hidden = load_reference(example_bwla).model(torch.tensor([tokens])).last_hidden_state[0, -1]
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(found.outputs.embedding), hidden, dim=0)
    assert cosine > 0.99  # codes at rounding ties may differ


def test_a_classifier_that_no_file_holds_is_named(qwen3: Any, start: Callable[..., Any]) -> None:
    with pytest.raises(StartError, match=r"score.weight: not found in the checkpoint.*classifier_from_token"):
        start(qwen3.folder, convert="classify", **POOLING)


def config_of(tied: bool = False, **values: Any) -> Any:
    """A transformers config, as far as the checks read it."""
    config = SimpleNamespace(tie_word_embeddings=tied, hidden_size=64, num_hidden_layers=2, **values)
    config.get_text_config = lambda: config
    return config


def test_tied_embeddings_are_known_where_the_text_config_does_not_say() -> None:
    for text in ({}, {"tie_word_embeddings": None}):
        outer = SimpleNamespace(
            tie_word_embeddings=True, get_text_config=lambda text=text: SimpleNamespace(**text)
        )
        assert ties_embeddings(outer)
    assert ties_embeddings(config_of(tied=True))
    assert not ties_embeddings(config_of(tied=False))


def test_a_classifier_from_an_8_bit_head_is_refused() -> None:
    """vLLM gives the head no quantization method where it derives a classifier from it."""
    quantization = BWLAFormat(format_version=2, rotation={"q_proj": (1, 8, 8)}, rank=0, lm_head=head_args())
    derived = config_of(classifier_from_token=["no", "yes"])
    with pytest.raises(StartError, match=r"lm_head: expected 16 bits.*--lm-head-bits 16"):
        check_derived_head(derived, quantization)
    check_derived_head(config_of(), quantization)
    check_derived_head(derived, quantization.model_copy(update={"lm_head": None}))
    planes = {"lm_head": None, "rotation": {"lm_head": (1, 8, 8)}, "ignore": []}
    with pytest.raises(StartError, match=r"lm_head: expected 16 bits.*--lm-head-bits 16"):
        check_derived_head(derived, quantization.model_copy(update=planes))


@pytest.mark.parametrize("listed", [True, False])
def test_an_override_that_changes_sizes_is_named(tmp_path: Path, listed: bool) -> None:
    """Dummy weights fit any size; the head and the number of labels are no sizes of stored tensors."""
    stored = {"tie_word_embeddings": False, "hidden_size": 64, "num_hidden_layers": 2, "num_labels": 2}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    values, asked = config_values(stored) if listed else None, config_of(num_labels=5)
    assert changed_sizes(tmp_path, asked, values) is None
    asked.num_hidden_layers = 1
    sentence = changed_sizes(tmp_path, asked, values)
    assert sentence is not None

    def config(load_format: str) -> Any:
        return SimpleNamespace(
            load_config=SimpleNamespace(load_format=load_format),
            model_config=SimpleNamespace(hf_config=asked),
        )

    quantization = BWLAFormat(rotation={"q_proj": (1, 8, 8)}, rank=0)
    check_request(config("dummy"), quantization, sentence)
    check_request(None, quantization, sentence)
    with pytest.raises(StartError, match="--hf-overrides: expected num_hidden_layers 2, .* found 1.*remove"):
        check_request(config("auto"), quantization, sentence)


def test_fewer_layers_of_dummy_weights(qwen3: Any, start: Callable[..., Any]) -> None:
    """The checkpoint is compared with its own config.json, not with the override."""
    override = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    with pytest.raises(StartError, match="--hf-overrides: expected num_hidden_layers 2"):
        start(qwen3.folder, hf_overrides=override)
    assert start(qwen3.folder, hf_overrides=override, load_format="dummy")


def test_a_size_of_each_layer_is_not_compared(tmp_path: Path) -> None:
    """Gemma 4 has heads of different widths; transformers refuses to name one."""

    class Heterogeneous(SimpleNamespace):
        @property
        def head_dim(self) -> int:
            raise RuntimeError("'head_dim' is a per-layer attribute")

    stored = {"head_dim": 32, "hidden_size": 64}
    assert changed_sizes(tmp_path, Heterogeneous(hidden_size=64), stored) is None
    assert "hidden_size 64" in str(changed_sizes(tmp_path, Heterogeneous(hidden_size=32), stored))
