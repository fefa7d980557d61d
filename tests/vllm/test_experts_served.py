"""Checkpoints with one-bit experts are served: the same answer as vLLM's own on the dequantized weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from any_decoder import Experts, write_checkpoint, write_source
from bwla_converter.checkpoint.dequantize import write_dequantized

from benchmarks.coverage.build import make_config
from benchmarks.coverage.cases import CASES

PROMPT = [3, 17, 99, 45, 200, 31, 8, 120, 77]

SERVED = ("qwen3_moe", "mixtral", "deepseek_v3", "olmoe")
"""One linear for each expert; another name around them; shared experts and a dense layer before; no head width."""


def write_case(case: str, folder: Path, experts: Experts | None = None, bits: int = 16) -> Path:
    """Write a random checkpoint of a case with one-bit experts; return its folder."""
    config = make_config(CASES[case])
    write_source(folder / "source", getattr(transformers, CASES[case].architecture), config)
    write_checkpoint(folder / "source", folder / "out", bits, experts=experts or Experts())
    return folder / "out"


def answer(engine: Any) -> tuple[list[int], list[dict[int, float]]]:
    """Return eight greedy tokens, and the log probabilities of the likeliest tokens of the prompt."""
    from vllm import SamplingParams

    options = SamplingParams(
        temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=5, detokenize=False
    )
    (result,) = engine.generate({"prompt_token_ids": PROMPT}, options, use_tqdm=False)
    tables = result.prompt_logprobs[1:]
    return list(result.outputs[0].token_ids), [
        {token: value.logprob for token, value in table.items()} for table in tables
    ]


def assert_same(found: Any, wanted: Any) -> None:
    """Compare two answers: the same tokens, and log probabilities within 1e-3."""
    tokens, tables = found
    assert tokens == wanted[0]
    for table, expected in zip(tables, wanted[1], strict=True):
        shared = table.keys() & expected.keys()
        assert len(shared) >= 4
        assert all(table[token] == pytest.approx(expected[token], abs=1e-3) for token in shared)


@pytest.mark.parametrize("case", SERVED)
def test_the_answer_is_that_of_the_dequantized_weights(
    case: str, start: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write_case(case, tmp_path, Experts(planes=2))
    write_dequantized(folder, tmp_path / "dequantized", "float32")
    found = answer(start(folder, skip_tokenizer_init=True))
    assert_same(found, answer(start(tmp_path / "dequantized", skip_tokenizer_init=True)))
    assert len(set(found[0])) > 2
