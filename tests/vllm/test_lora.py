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

RANK, STEPS = 8, 24
PROMPTS = ("It was a dark night", "The captain said", "She looked at him and")
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK, "max_model_len": 128}

Answers = list[tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def example_a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with 8-bit head and 16-bit activations: nothing but the weights is rounded."""
    out = tmp_path_factory.mktemp("lora") / "a16"
    convert(Options(str(EXAMPLE), out, rank=1, head_bits=8, bits=16))
    return out


def write_adapter(base: Path, folder: Path, seed: int, scale: float = 0.05, head: bool = False) -> Path:
    """Write a PEFT adapter of rank 8 for all quantized linears of `base`, and its head if `head`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        name: (spec.out_features, spec.in_features) for name, spec in check_folder(base, read_folder(base)).items()
    }
    if head:
        config = json.loads((base / "config.json").read_text())
        sizes["lm_head"] = config["vocab_size"], config["hidden_size"]
    tensors = {}
    for name, (rows, columns) in sizes.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * scale
        tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * scale
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({name.rpartition(".")[2] for name in sizes})
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": leaves, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def adapters(example_a16: Path, tmp_path: Path) -> list[Any]:
    """Requests for no adapter, one for the linears, and another for the linears and the head."""
    from vllm.lora.request import LoRARequest

    one = write_adapter(example_a16, tmp_path / "one", 1)
    two = write_adapter(example_a16, tmp_path / "two", 2, head=True)
    return [None, LoRARequest("one", 1, str(one)), LoRARequest("two", 2, str(two))]


def answers(engine: Any, adapters: list[Any]) -> list[Answers]:
    """Answer every prompt with every adapter in one batch; tokens and their log probabilities by adapter."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, logprobs=1)
    requests = [adapter for adapter in adapters for _ in PROMPTS]
    lora = {"lora_request": requests} if any(requests) else {}
    replies = engine.generate([*PROMPTS] * len(adapters), options, use_tqdm=False, **lora)
    found = []
    for reply in replies:
        output = reply.outputs[0]
        tokens = list(output.token_ids)
        tables = zip(output.logprobs, tokens, strict=True)
        found.append((tokens, [table[token].logprob for table, token in tables]))
    return [found[i : i + len(PROMPTS)] for i in range(0, len(found), len(PROMPTS))]


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
