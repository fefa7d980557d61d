"""LoRA adapters on quantized checkpoints, against vLLM on the dequantized weights with the same adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels.format.files import read_folder
from bwla_kernels.format.folder import check_folder
from paths import EXAMPLE
from safetensors.torch import save_file

from benchmarks.common.tiny_models import write_model

RANK, STEPS = 8, 24
PROMPTS = ("It was a dark night", "The captain said", "She looked at him and")
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK, "max_model_len": 128}

Answers = list[tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def example_a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with 8-bit head and 16-bit activations: nothing but the weights is rounded."""
    out = tmp_path_factory.mktemp("lora") / "a16"
    convert(Options(str(EXAMPLE), out, rank=1, head_bits=8, bits=16, recipe="data-free"))
    return out


def write_adapter(
    base: Path, folder: Path, seed: int, scale: float = 0.05, head: bool = False, embedding: bool = False
) -> Any:
    """Write a PEFT adapter of rank 8 for all quantized linears of `base`; return the request that names it.

    Args:
        scale: standard deviation of both matrices.
        head, embedding: whether the adapter changes these too.
    """
    from vllm.lora.request import LoRARequest

    config = json.loads((base / "config.json").read_text())
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        name: (spec.out_features, spec.in_features)
        for name, spec in check_folder(base, read_folder(base)).items()
    }
    if head:
        sizes["lm_head"] = vocabulary, hidden
    tensors = {}
    for name, (rows, columns) in sizes.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * scale
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * scale
    if embedding:
        stem = "base_model.model.model.embed_tokens"
        tensors[f"{stem}.lora_embedding_A"] = torch.randn(RANK, vocabulary, generator=generator)
        tensors[f"{stem}.lora_embedding_B"] = torch.randn(hidden, RANK, generator=generator)
        sizes["model.embed_tokens"] = vocabulary, hidden
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({name.rpartition(".")[2] for name in sizes})
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": leaves, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return LoRARequest(folder.name, seed, str(folder))


@pytest.fixture
def adapters(example_a16: Path, tmp_path: Path) -> list[Any]:
    """Requests for no adapter, one for the linears, and another for the linears and the head."""
    one = write_adapter(example_a16, tmp_path / "one", 1)
    return [None, one, write_adapter(example_a16, tmp_path / "two", 2, head=True)]


def answers(engine: Any, adapters: list[Any], prompts: tuple[str, ...] = PROMPTS) -> list[Answers]:
    """Answer every prompt with every adapter in one batch; tokens and their log probabilities by adapter."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, logprobs=1)
    requests = [adapter for adapter in adapters for _ in prompts]
    lora = {"lora_request": requests} if any(requests) else {}
    replies = engine.generate([*prompts] * len(adapters), options, use_tqdm=False, **lora)
    found = []
    for reply in replies:
        output = reply.outputs[0]
        tokens = list(output.token_ids)
        tables = zip(output.logprobs, tokens, strict=True)
        found.append((tokens, [table[token].logprob for table, token in tables]))
    return [found[i : i + len(prompts)] for i in range(0, len(found), len(prompts))]


def agree(ours: Answers, theirs: Answers, within: float) -> None:
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(ours, theirs, strict=True):
        assert tokens == other_tokens
        assert logprobs == pytest.approx(other_logprobs, abs=within)


def test_adapters_answer_as_on_the_dequantized_weights(
    example_a16: Path, adapters: list[Any], start: Callable[..., Any], tmp_path: Path
) -> None:
    """Three kinds of requests in one batch; those without an adapter get the text of an engine without LoRA."""
    write_dequantized(example_a16, tmp_path / "plain", "float32")
    (bare,) = answers(start(example_a16, max_model_len=128), [None])
    ours = answers(start(example_a16, **LORA), adapters)
    theirs = answers(start(tmp_path / "plain", **LORA), adapters)
    for mine, other in zip(ours, theirs, strict=True):
        agree(mine, other, 2e-3)
    agree(ours[0], bare, 1e-4)
    texts = [[tokens for tokens, _ in found] for found in ours]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert all(a != b for a, b in zip(texts[one], texts[two], strict=True))


def test_a_request_without_an_adapter_beside_one_with_the_last_adapter(
    example_a16: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    """vLLM's operations for CPUs confuse the two: `bwla_vllm.compat.cpu_lora`."""
    (bare,) = answers(start(example_a16, max_model_len=128), [None])
    one = write_adapter(example_a16, tmp_path / "one", 1, head=True)
    options = {**LORA, "max_loras": 1, "max_num_seqs": 2 * len(PROMPTS)}
    ours = answers(start(example_a16, **options), [None, one])
    agree(ours[0], bare, 1e-4)
    assert all(a[0] != b[0] for a, b in zip(*ours, strict=True))


def test_a_compiled_engine_with_6_bit_activations(
    qwen3: Any, golden: Any, start: Callable[..., Any], compare: Callable[..., None], tmp_path: Path
) -> None:
    """Without the adapter, answers and log probabilities stay the reference's."""
    engine = start(qwen3.folder, enforce_eager=False, **{**LORA, "max_model_len": 64})
    adapter = write_adapter(qwen3.folder, tmp_path / "one", 1, scale=0.3)
    compare(engine, golden)
    bare, adapted = answers(engine, [None, adapter], ("t1 t2 t3 t4",))
    assert bare[0][0] != adapted[0][0]
    compare(engine, golden)


def test_the_8_bit_embedding_and_the_head_tied_to_it(
    start: Callable[..., Any], tokenizer: Callable[[Path], None], tmp_path: Path
) -> None:
    """Against the dequantized weights; the adapter changes the embedding's rows too."""
    ids = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 255}
    source = write_model(
        tmp_path / "source", "Qwen3", dtype=torch.float32, lively=True, tie_word_embeddings=True, **ids
    )
    tokenizer(source)
    out, prompts = tmp_path / "out", ("t1 t2 t3 t4", "t9 t8")
    convert(Options(str(source), out, rank=2, bits=16, recipe="data-free"))
    assert "embedding" in json.loads((out / "config.json").read_text())["quantization_config"]
    write_dequantized(out, tmp_path / "plain", "float32")
    adapters = [None, write_adapter(out, tmp_path / "one", 1, scale=0.2, embedding=True)]
    options = {**LORA, "max_model_len": 64}
    ours = answers(start(out, **options), adapters, prompts)
    theirs = answers(start(tmp_path / "plain", **options), adapters, prompts)
    for mine, other in zip(ours, theirs, strict=True):
        agree(mine, other, 2e-3)
    assert all(a[0] != b[0] for a, b in zip(*ours, strict=True))


@pytest.mark.slow
def test_two_ranks_and_fully_sharded_adapters(
    example_a16: Path, adapters: list[Any], start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    one = answers(start(example_a16, **LORA), adapters)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    for fully_sharded in (False, True):
        two = answers(start(example_a16, fully_sharded_loras=fully_sharded, **ranks, **LORA), adapters)
        for mine, other in zip(two, one, strict=True):
            agree(mine, other, 2e-3)
