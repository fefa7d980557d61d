"""Engines on tiny checkpoints: at float32, log probabilities equal the reference implementation's to 4 decimals."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bwla_vllm.errors import StartError

CASES = {
    "qwen3": {"kind": "qwen3"},
    "llama-tied-weight-only": {"kind": "llama", "tied": True, "rank": 0, "bits": 16},
    "qwen2-biases": {
        "kind": "qwen2",
        "bits": 8,
        "rank": {"o_proj": 3, "down_proj": 1},
        "rotation": {"o_proj": (1, 8, 8)},
        "clip": {"down_proj": 0.9},
    },
    "mistral-ignored-mlp": {"kind": "mistral", "bits": 4, "ignore": ("lm_head", "re:.*layers.1.mlp.*")},
}


@pytest.mark.parametrize("case", CASES)
def test_eager_equals_reference(
    case: str,
    make_checkpoint: Callable[..., Any],
    start: Callable[..., Any],
    compare: Callable[..., None],
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(tmp_path, **CASES[case])
    compare(start(checkpoint.folder), checkpoint.golden())


def test_compiled_equals_reference(
    qwen3: Any, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    """vLLM compiles the whole model as one graph and fails on a graph break."""
    engine = start(qwen3.folder, enforce_eager=False)
    compare(engine, golden)
    assert engine.llm_engine.vllm_config.additional_config["bwla"]["backends"]


def test_bfloat16_is_as_close_as_transformers(
    qwen3: Any, golden: Any, start: Callable[..., Any], score: Callable[..., Any]
) -> None:
    """The yardstick is the reference implementation's own error when everything around the layers is bfloat16."""
    with torch.no_grad():
        logits = copy.deepcopy(qwen3.model).bfloat16()(torch.tensor([golden.prompt])).logits[0]
    yardstick = (logits.float().log_softmax(-1) - golden.logprobs[: len(golden.prompt)]).abs().mean()
    errors = [
        abs(value - wanted[token].item())
        for wanted, found in zip(
            golden.logprobs, score(start(qwen3.folder, dtype="bfloat16"), golden.prompt), strict=False
        )
        for token, value in found.items()
    ]
    assert sum(errors) / len(errors) < 1.5 * yardstick


def test_reloaded_weights_answer_the_same(
    qwen3: Any, golden: Any, start: Callable[..., Any], compare: Callable[..., None]
) -> None:
    """vLLM restores registered parameters and nothing else: all that a layer uses must be among them."""
    engine = start(qwen3.folder)

    def spoil(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()

    engine.apply_model(spoil)
    engine.collective_rpc("reload_weights")
    compare(engine, golden)


def test_dummy_weights_need_no_weights(
    qwen3: Any, start: Callable[..., Any], score: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(qwen3.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors*"))
    scores = score(start(folder, load_format="dummy"), [1, 2, 3])
    assert all(value <= 0 for table in scores for value in table.values())  # no NaN either


def test_damaged_checkpoint_ends_the_start_with_one_sentence(
    qwen3: Any, start: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(qwen3.folder, tmp_path / "copy")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StartError, match=r"model-00002-of-00002\.safetensors: the file is missing"):
        start(folder)


def test_plain_model_with_the_flag_is_explained(
    qwen3: Any, start: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(qwen3.folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartError, match="--quantization bwla needs a BWLA checkpoint"):
        start(folder, quantization="bwla")
