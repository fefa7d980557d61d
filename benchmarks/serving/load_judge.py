"""The verdict of load.py: which answers under load are those alone, and how likely the others are.

An answer that differs is scored alone: its gap is the largest difference in log probability between one of its tokens
and the most likely token. For comparison, answers to other prompts are scored, and answers of other adapters to the
same prompt.
"""

import math
import random
import statistics
from typing import Any, Literal

from openai import AsyncOpenAI

from benchmarks.common.server import Server
from benchmarks.serving.load_requests import Answer, Prompt, Request

CONTROLS = 40
"""Number of answers that are scored after the wrong prompt, and again with the wrong adapter."""


async def worst_gap(client: AsyncOpenAI, model: str, prompt: list[int], answer: list[int]) -> float:
    """Return the largest gap in log probability (nats) between a token of `answer` and the most likely one."""
    reply = await client.completions.create(
        model=model, prompt=[*prompt, *answer], max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 1}
    )
    tables = reply.choices[0].prompt_logprobs[len(prompt) :]
    gaps = []
    for token, table in zip(answer, tables, strict=True):
        values = {int(key): float(value["logprob"]) for key, value in table.items()}
        gaps.append(max(values.values()) - values[token])
    return max(gaps, default=math.inf)


def compare(
    plan: list[Request], answers: list[Answer], references: list[Answer]
) -> tuple[dict[str, int], list[int]]:
    """Compare the answers under load with the answers alone.

    Returns: how many were compared, are identical, were mixed up and cut short, and the positions in the plan of those
        that differ. A cancelled answer is identical if it is the beginning of the answer alone. Any other answer that
        is only the beginning, or has no finish reason, was cut short. An answer is mixed up if it is that to another
        prompt or of another adapter, or if the server read another prompt.
    """
    owners: dict[tuple[int, ...], set[int]] = {}
    for index, reference in enumerate(references):
        owners.setdefault(tuple(reference.tokens), set()).add(index)
    counts = dict.fromkeys(("compared", "identical", "mixed_up", "cut_short"), 0)
    different = []
    for number, (request, answer) in enumerate(zip(plan, answers, strict=True)):
        if request.kind == "malformed" or answer.error:
            continue
        reference = references[request.index]
        counts["compared"] += 1
        begins = answer.tokens == reference.tokens[: len(answer.tokens)]
        whole = (answer.tokens, answer.finish) == (reference.tokens, reference.finish)
        same = begins if request.kind == "cancel" else whole
        counts["identical"] += same
        if not same:
            found = owners.get(tuple(answer.tokens), {request.index})
            counts["mixed_up"] += (
                request.index not in found or answer.prompt_tokens != reference.prompt_tokens
            )
            counts["cut_short"] += request.kind != "cancel" and (begins or not answer.finish)
            different.append(number)
    return counts, different


def draw_controls(
    pool: list[Prompt], references: list[Answer], wrong: Literal["text", "adapter"], count: int = CONTROLS
) -> list[tuple[int, int]]:
    """Return random pairs of prompts that differ in the text alone or in the adapter alone, and so do their answers.

    Returns: pairs of positions in the pool, fewer than `count` if some prompts have no partner.
    """
    rng = random.Random(0)
    pairs = []
    for _ in range(count):
        mine = rng.randrange(len(pool))
        partners = [
            other
            for other, prompt in enumerate(pool)
            if (prompt.text != pool[mine].text) == (wrong == "text")
            and (prompt.adapter != pool[mine].adapter) == (wrong == "adapter")
            and references[other].tokens != references[mine].tokens
        ]
        if partners:
            pairs.append((mine, rng.choice(partners)))
    return pairs


def count_separating(pool: list[Prompt], references: list[Answer]) -> int:
    """Return the number of texts to which the base model and all adapters give different answers."""
    answers: dict[str, list[tuple[int, ...]]] = {}
    for prompt, reference in zip(pool, references, strict=True):
        answers.setdefault(prompt.text, []).append(tuple(reference.tokens))
    return sum(len(set(found)) == len(found) for found in answers.values())


async def judge(
    server: Server,
    pool: list[Prompt],
    plan: list[Request],
    answers: list[Answer],
    references: list[Answer],
) -> dict[str, Any]:
    """Compare the answers under load with the answers alone, and score those that differ."""
    counts, different = compare(plan, answers, references)
    rows: list[dict[str, Any]] = []
    gaps: list[float] = []
    controls: dict[str, list[float]] = {"text": [], "adapter": []}
    async with AsyncOpenAI(base_url=server.url, api_key="none") as client:

        async def score(index: int, tokens: list[int]) -> float:
            model = pool[index].adapter or server.model
            return await worst_gap(client, model, references[index].prompt_tokens, tokens)

        for number in different:
            request = plan[number]
            gap = await score(request.index, answers[number].tokens)
            gaps.append(gap)
            adapter = {"adapter": name} if (name := pool[request.index].adapter) else {}
            rows.append({"prompt": request.index, **adapter, "kind": request.kind, "gap": round(gap, 4)})
        for mine, other in draw_controls(pool, references, "text"):
            controls["text"].append(await score(mine, references[other].tokens))
        for mine, other in draw_controls(pool, references, "adapter"):
            controls["adapter"].append(await score(mine, references[other].tokens))
    found = {
        **counts,
        "rescored": len(rows),
        "largest_gap_of_rescored_nats": max(gaps, default=0.0),
        "median_gap_of_wrong_prompts_nats": statistics.median(controls["text"] or [0.0]),
        "smallest_gap_of_wrong_prompts_nats": min(controls["text"], default=0.0),
        "widest": sorted(rows, key=lambda row: -row["gap"])[:5],
    }
    if any(prompt.adapter for prompt in pool):
        found |= {
            "prompts_separating_adapters": count_separating(pool, references),
            "median_gap_of_wrong_adapters_nats": statistics.median(controls["adapter"] or [0.0]),
            "smallest_gap_of_wrong_adapters_nats": min(controls["adapter"], default=0.0),
        }
    return found
