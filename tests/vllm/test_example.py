"""The converted example in vLLM against the definition put into transformers' model."""

from pathlib import Path

import pytest
import torch
from bwla_converter import hf
from bwla_kernels import reference
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = 8
STEPS = 64
SAFE_MARGIN = 3e-5
"""Distance from a rounding tie, in codes, that float32 sums in another order do not bridge."""


@pytest.fixture(scope="module")
def definition(example_bwla: Path):
    """transformers' model in float32 with `reference.linear` in every quantized layer."""
    patch = pytest.MonkeyPatch()
    patch.setenv(hf.BACKEND_VARIABLE, hf.REFERENCE)
    model = AutoModelForCausalLM.from_pretrained(example_bwla, dtype=torch.float32).eval()
    patch.undo()
    return model


@pytest.fixture(scope="module")
def text_ids(example_bwla: Path) -> Tensor:
    held_out = Path(__file__).resolve().parents[2] / "examples" / "text" / "heldout.txt"
    tokenizer = AutoTokenizer.from_pretrained(example_bwla)
    return tokenizer(held_out.read_text()[:40000], return_tensors="pt", verbose=False).input_ids[0]


@torch.no_grad()
def logprobs_of(model, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def smallest_margin(model, tokens: list[int]) -> float:
    """How close any activation of a forward pass comes to a rounding tie, in codes."""
    margins = []

    def watch(layer: hf.BWLALinear, inputs: tuple[Tensor, ...]) -> None:
        stored, spec = layer.stored(), layer.spec
        x_hat = reference.rotate(inputs[0].flatten(0, -2), stored["rotation_left"], stored["rotation_right"])
        cells = (x_hat * stored["column_scale"]).unflatten(1, (spec.blocks, spec.block_width))
        codes = (cells / (cells.abs().amax(-1, keepdim=True) * (spec.clip / spec.q_max))).abs()
        margins.append(((codes - codes.floor()) - 0.5).abs()[codes < spec.q_max - 0.4].min().item())

    handles = [
        layer.register_forward_pre_hook(watch)
        for layer in model.modules()
        if isinstance(layer, hf.BWLALinear)
    ]
    logprobs_of(model, tokens)
    for handle in handles:
        handle.remove()
    return min(margins)


def test_greedy_answers_and_logprobs_agree(example_bwla: Path, definition, text_ids: Tensor, start) -> None:
    from vllm import SamplingParams

    engine = start(example_bwla, max_model_len=128)
    prompts = [text_ids[100 * i : 100 * i + 12 + i].tolist() for i in range(PROMPTS)]
    options = SamplingParams(temperature=0.0, max_tokens=STEPS, logprobs=1, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": p} for p in prompts], options, use_tqdm=False)
    worst = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = list(answer.outputs[0].token_ids)
        assert len(tokens) == STEPS
        wanted = logprobs_of(definition, [*prompt, *tokens])[len(prompt) - 1 : -1]
        assert wanted.argmax(-1).tolist() == tokens
        for step, table in enumerate(answer.outputs[0].logprobs):
            worst = max(worst, abs(table[tokens[step]].logprob - wanted[step, tokens[step]].item()))
    assert worst <= 0.05


def test_golden_prompt_logprobs_agree_to_four_decimals(
    example_bwla: Path, definition, text_ids: Tensor, start, score
) -> None:
    """At a rounding tie the next code is as right, so prompts that come close to one are left out."""
    prompts = [text_ids[50 * i : 50 * i + 8].tolist() for i in range(60)]
    safe = [prompt for prompt in prompts if smallest_margin(definition, prompt) > SAFE_MARGIN][:6]
    assert len(safe) >= 3
    engine = start(example_bwla, max_model_len=128)
    for prompt in safe:
        wanted = logprobs_of(definition, prompt)
        for step, table in enumerate(score(engine, prompt)):
            for token, value in table.items():
                assert value == pytest.approx(wanted[step, token].item(), abs=1e-4)
