"""A tiny random model of every family is converted, served, and answers as the reference implementation does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from golden import find_golden, load_reference, watched

from benchmarks.common.tiny_models import FAMILIES, write_model

VOCABULARY = 256
LENGTH = 14
"""Longer than the sliding windows (8), so that a block that ignores its window shows."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, no grouped queries": ("Llama", {"num_key_value_heads": 4}),
    "Llama 3, its rope, tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "Llama, biases everywhere": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral, sliding window": ("Mistral", {"sliding_window": 8}),
    # vLLM and transformers derive this family's head width from the hidden size.
    "Qwen2, biases, tied": (
        "Qwen2",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "Qwen3": ("Qwen3", {}),
    "Gemma 2, soft caps, every other window": ("Gemma 2", {"attn_logit_softcapping": 5.0}),
    "Gemma 3, two ropes": ("Gemma 3", {}),
    "Phi-3": ("Phi-3", {}),
    "Phi-4 mini, tied, part of each head rotated": (
        "Phi-3",
        {"tie_word_embeddings": True, "partial_rotary_factor": 0.75},
    ),
}


def test_every_family_is_among_the_cases() -> None:
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_converted_and_served_equals_the_definition(
    case: str,
    tokenizer: Callable[[Path], None],
    start: Callable[..., Any],
    compare: Callable[..., None],
    tmp_path: Path,
) -> None:
    family, config = CASES[case]
    ids = {"bos_token_id": 0, "eos_token_id": 255}
    source = write_model(
        tmp_path / "source",
        family,
        shards=2,
        dtype=torch.float32,
        lively=True,
        vocab_size=VOCABULARY,
        **ids,
        **config,
    )
    tokenizer(source)
    out = tmp_path / "out"
    convert(Options(str(source), out, rank=2, recipe="data-free"))
    model = load_reference(out)
    with watched(model) as margin:
        golden = find_golden(model, margin, VOCABULARY, LENGTH)
    compare(start(out), golden)


@pytest.mark.parametrize("family", ["Qwen3", "Phi-3"])
def test_planes_that_differ_between_input_groups(
    family: str,
    tokenizer: Callable[[Path], None],
    start: Callable[..., Any],
    compare: Callable[..., None],
    tmp_path: Path,
) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": 255}
    source = write_model(
        tmp_path / "source", family, dtype=torch.float32, lively=True, vocab_size=VOCABULARY, **ids
    )
    tokenizer(source)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 60)
    out = tmp_path / "out"
    calibration = Calibration(str(tmp_path / "text.txt"), 8, 32)
    # Several planes amplify the difference between two orders of summation; with few codes it crosses no rounding tie.
    options = Options(
        str(source), out, recipe="fast", target_bits=3.4, bits=4, clip=1.0, calibration=calibration
    )
    summary = convert(options)
    assert len(summary.planes) > 1
    model = load_reference(out)
    with watched(model) as margin:
        golden = find_golden(model, margin, VOCABULARY, LENGTH)
    compare(start(out), golden)
