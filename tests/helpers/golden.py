"""Prompts whose activations stay clear of rounding ties, with the reference implementation's answers.

Near a tie, float32 sums in another order may round to the neighbouring code, which is not an error but changes the
fourth decimal of a log probability.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bwla_converter.hf import modules as hf
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec
from torch import Tensor, nn

PROMPT_LENGTH, NEW_TOKENS = 9, 5
SAFE_MARGIN = 1.5e-4


@dataclass(frozen=True)
class Golden:
    """A prompt, the reference's answer, and its log probabilities [length, vocabulary] for both."""

    prompt: list[int]
    answer: list[int]
    logprobs: Tensor


def margin_of(x: Tensor, tensors: dict[str, Tensor], spec: LayerSpec) -> float:
    """Return the distance of a layer's input x [..., K] from a rounding tie, in codes."""
    if spec.bits == 16:
        return 0.5
    flat = x.reshape(-1, spec.in_features)
    rotated = reference.rotate(flat, tensors["rotation_left"], tensors["rotation_right"])
    cells = (rotated * tensors["column_scale"]).view(len(flat), spec.rotation_groups, -1)
    codes = cells / (cells.abs().amax(-1, keepdim=True) * (spec.clip / spec.q_max))
    # The largest element of a block sits on a code, or beyond the clip, by construction.
    inner = codes.abs() < spec.q_max - 0.4
    return ((codes - codes.floor()) - 0.5).abs()[inner].min().item()


def load_reference(folder: Path) -> nn.Module:
    """Load a checkpoint with transformers in float32, with the reference implementation in every quantized layer."""
    from transformers import AutoModelForCausalLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(hf.BACKEND_VARIABLE, hf.REFERENCE)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()
    assert isinstance(model, nn.Module)
    return model


@contextmanager
def watched(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Watch the quantized layers of a model; yield a function that returns the smallest margin since its last call."""
    margins: list[float] = []

    def watch(layer: hf.BWLALinear, inputs: tuple[Tensor, ...]) -> None:
        margins.append(margin_of(inputs[0], layer.stored(), layer.spec))

    def smallest() -> float:
        margin = min(margins)
        margins.clear()
        return margin

    layers = [module for module in model.modules() if isinstance(module, hf.BWLALinear)]
    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    yield smallest
    for handle in handles:
        handle.remove()


@torch.no_grad()
def find_golden(
    model: nn.Module, margin: Callable[[], float], vocabulary: int, length: int = PROMPT_LENGTH
) -> Golden:
    """Return a random prompt that `model` answers without ties; `margin` returns the margin of its last run."""
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([tokens])).logits[0]
            tokens.append(int(logits[-1].argmax()))
            if margin() < SAFE_MARGIN:
                break
        else:
            return Golden(tokens[:length], tokens[length:], logits.log_softmax(-1))
    raise AssertionError("expected a prompt that stays clear of rounding ties, found none in 1000 seeds")
