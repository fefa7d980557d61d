"""Checkpoints with one-bit experts are served: the same answer as vLLM's own on the dequantized weights."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from any_decoder import Experts, write_checkpoint, write_source
from bwla_converter.checkpoint.dequantize import write_dequantized
from greedy import answer

from benchmarks.coverage.build import make_config
from benchmarks.coverage.cases import CASES
from bwla_vllm import observe
from bwla_vllm.errors import StartError

SERVED = ("qwen3_moe", "mixtral", "deepseek_v3", "olmoe", "gpt_oss")
"""One linear for each expert; another name around them; shared experts and a dense layer before; no head width."""


RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def write_case(case: str, folder: Path, experts: Experts | None = None, **options: Any) -> Path:
    """Write a random checkpoint of a case with one-bit experts; return its folder."""
    config = make_config(CASES[case])
    write_source(folder / "source", getattr(transformers, CASES[case].architecture), config)
    write_checkpoint(folder / "source", folder / "out", experts=experts or Experts(), **options)
    return folder / "out"


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
    compare_with_dequantized(case, start, tmp_path)


def compare_with_dequantized(case: str, start: Callable[..., Any], folder: Path, **options: Any) -> None:
    """Compare the answers of a checkpoint and of its dequantized weights; `options` are those of the first engine."""
    checkpoint = write_case(case, folder, Experts(planes=2))
    write_dequantized(checkpoint, folder / "dequantized", "float32")
    found = answer(start(checkpoint, skip_tokenizer_init=True, **options), 8)
    assert_same(found, answer(start(folder / "dequantized", skip_tokenizer_init=True), 8))
    assert len(set(found[0])) > 2


@pytest.fixture(scope="module")
def six_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the CPU kernel, whose down projections can be cut in two; leave it as it is."""
    experts = Experts(rotation=(2, 4, 8), planes=2, rank=1)
    return write_case("qwen3_moe", tmp_path_factory.mktemp("six"), experts, bits=6, ignore=("self_attn",))


def test_the_kernel_agrees_with_the_reference(
    six_bits: Path,
    start: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An engine sets up vLLM's loggers anew.
    monkeypatch.setattr(observe, "logger", logging.getLogger("observed"))
    caplog.set_level(logging.INFO, "observed")
    monkeypatch.setenv("BWLA_CHECK_LAYERS", "2")
    answer(start(six_bits, skip_tokenizer_init=True), 8)
    messages = [record.getMessage() for record in caplog.records if record.name == "observed"]
    (row,) = [line for message in messages for line in message.splitlines() if line.startswith("experts ")]
    assert row.split()[1] == "cpu"
    assert "W1A6 rank 1/2" in row
    assert "4 x (128 x 64 + 64 x 64)" in row
    reports = [message for message in messages if "2 groups of experts" in message]
    assert [report.partition(",")[0] for report in reports] == [
        "BWLA_CHECK_LAYERS: call 1 of 2",
        "BWLA_CHECK_LAYERS: call 2 of 2",
    ]
    assert all(float(report.rpartition(" ")[2]) < 1e-5 for report in reports)


def test_compiled_reloaded_and_read_from_one_file(six_bits: Path, start: Callable[..., Any]) -> None:
    """vLLM compiles the whole model as one graph, and restores what is registered when weights are loaded again."""
    wanted = answer(start(six_bits, skip_tokenizer_init=True), 8)
    engine = start(six_bits, skip_tokenizer_init=True, enforce_eager=False)
    assert_same(answer(engine, 8), wanted)

    def spoil(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.data.zero_()

    engine.apply_model(spoil)
    engine.collective_rpc("reload_weights")
    assert_same(answer(engine, 8), wanted)


def test_dummy_weights_need_no_weights(six_bits: Path, start: Callable[..., Any], tmp_path: Path) -> None:
    """vLLM's random values are no rotations; the sizes come from config.json."""
    shutil.copy(six_bits / "config.json", tmp_path)
    tokens, tables = answer(start(tmp_path, skip_tokenizer_init=True, load_format="dummy"), 8)
    assert len(tokens) == 8
    assert all(value <= 0 for table in tables for value in table.values())  # no NaN either


def test_a_rank_that_would_skip_expert_0_is_refused(six_bits: Path, start: Callable[..., Any]) -> None:
    with pytest.raises(StartError, match=r"--enable-ep-weight-filter: expected every rank to read expert 0"):
        start(six_bits, skip_tokenizer_init=True, enable_expert_parallel=True, enable_ep_weight_filter=True)


def test_adapters_beside_experts(six_bits: Path, start: Callable[..., Any]) -> None:
    wanted = answer(start(six_bits, skip_tokenizer_init=True), 8)
    with pytest.raises(
        StartError, match=r"--enable-lora: expected adapters that leave one-bit experts alone"
    ):
        start(six_bits, skip_tokenizer_init=True, enable_lora=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    engine = start(six_bits, skip_tokenizer_init=True, enable_lora=True, lora_target_modules=targets)
    assert_same(answer(engine, 8), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
def test_two_ranks_say_the_same(
    expert_parallel: bool, six_bits: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank has none of the experts that store an input transform, if each has whole experts."""
    wanted = answer(start(six_bits, skip_tokenizer_init=True), 8)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {**RANKS, "enable_expert_parallel": expert_parallel}
    assert_same(answer(start(six_bits, skip_tokenizer_init=True, **options), 8), wanted)


def test_vllms_layer_of_experts_in_a_class_of_transformers(start: Callable[..., Any], tmp_path: Path) -> None:
    """The last test of the file, because vLLM changes transformers' class for the rest of the process."""
    compare_with_dequantized("qwen3_moe", start, tmp_path, model_impl="transformers")
