"""The models of load.py: converted ones of several kinds, and how vLLM serves each."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.record import ROOT
from benchmarks.common.tiny_models import EXPERTS, write_model
from benchmarks.serving.engines import convert, write_config

EXAMPLE = ROOT / "examples" / "model"
CALIBRATION = ROOT / "examples" / "text" / "calibration.txt"

ADAPTERS = tuple(f"adapter-{number}" for number in range(1, 5))
"""Names of the LoRA adapters in requests."""

ADAPTERS_IN_A_BATCH = 3
"""Fewer than there are, so that vLLM also has to exchange them."""

ADAPTER_RANK = 8

EXPERTS_SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
}
"""Changes to the sizes of `EXPERTS`, so that there is more to choose from and answers may be long."""


@dataclass(frozen=True)
class Served:
    """A model to serve.

    Attributes:
        folder: the converted model.
        flags: further arguments of `vllm serve`.
        adapters: names of LoRA adapters that requests may ask for.
    """

    folder: Path
    flags: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def make_model(name: str, work: Path) -> Served:
    """Make one of `MODELS` in the folder `work`; any other name is the folder of a converted model."""
    return MODELS[name](work) if name in MODELS else Served(Path(name))


def make_example(work: Path) -> Served:
    """Convert the example to one bit a weight."""
    out = work / "model"
    convert(EXAMPLE, out, "--recipe", "data-free")
    return Served(out)


def make_planes(work: Path) -> Served:
    """Convert the example to two planes a weight, which is version 2 of the format."""
    out = work / "model"
    convert(EXAMPLE, out, "--planes", "2", "--calibration", CALIBRATION, "--num-calibration-samples", "8")
    return Served(out)


def make_lora(work: Path) -> Served:
    """Convert the example, and write random adapters for it."""
    served = make_example(work)
    for seed, name in enumerate(ADAPTERS):
        write_adapter(work / name, seed)
    flags = ["--enable-lora", "--max-loras", str(ADAPTERS_IN_A_BATCH), "--max-lora-rank", str(ADAPTER_RANK)]
    modules = [f"{name}={work / name}" for name in ADAPTERS]
    return Served(served.folder, (*flags, "--lora-modules", *modules), ADAPTERS)


def write_adapter(folder: Path, seed: int) -> None:
    """Write a random adapter for the linears of the example, strong enough to change its answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    # PEFT's own initialization leaves an adapter without effect; without it, both matrices are random.
    config = LoraConfig(
        r=ADAPTER_RANK, lora_alpha=ADAPTER_RANK, target_modules="all-linear", init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(EXAMPLE), config).save_pretrained(str(folder))


def make_experts(work: Path) -> Served:
    """Convert a random mixture of experts with the example's tokenizer and vocabulary to one bit a weight."""
    source, out = work / "source", work / "model"
    write_model(source, EXPERTS, lively=True, **EXPERTS_SIZES, **_save_tokenizer(source))
    convert(source, out, "--recipe", "data-free")
    return Served(out)


def make_dummy(work: Path) -> Served:
    """Write random weights of Qwen3-0.6B's shape with the example's tokenizer and vocabulary."""
    out = work / "model"
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder)
        write_config(plain, "0.6b")
        config = json.loads((plain / "config.json").read_text()) | _save_tokenizer(plain)
        (plain / "config.json").write_text(json.dumps(config))
        convert(plain, out, "--dummy")
    return Served(out)


def _save_tokenizer(folder: Path) -> dict[str, Any]:
    """Save the example's tokenizer to `folder`; return the settings of a model that fit it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    tokenizer.save_pretrained(folder)
    return {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}


MODELS: Mapping[str, Callable[[Path], Served]] = {
    "example": make_example,
    "planes": make_planes,
    "lora": make_lora,
    "experts": make_experts,
    "dummy": make_dummy,
}
"""The models by name, in the order in which they are tested."""
