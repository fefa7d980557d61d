"""The greedy answer of an engine of vLLM to one prompt, with log probabilities."""

from typing import Any

PROMPT = [3, 17, 99, 45, 200, 31, 8, 120, 77]


def answer(engine: Any, max_tokens: int = 5) -> tuple[list[int], list[dict[int, float]]]:
    """Return `max_tokens` greedy tokens, and the log probabilities of the likeliest tokens of the prompt."""
    from vllm import SamplingParams

    options = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=5, detokenize=False
    )
    (result,) = engine.generate({"prompt_token_ids": PROMPT}, options, use_tqdm=False)
    tables = result.prompt_logprobs[1:]
    return list(result.outputs[0].token_ids), [
        {token: value.logprob for token, value in table.items()} for table in tables
    ]
