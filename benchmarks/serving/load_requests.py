"""The requests of load.py: a pool of prompts, a plan that mixes them, and a function that sends one.

The prompts are all different, so that an answer that reaches the wrong client is recognized. With adapters, each prompt
is sent to the base model and to every adapter.
"""

import random
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx
from openai import APIStatusError, AsyncOpenAI

Kind = Literal["whole", "stream", "cancel", "malformed"]

SHARES: tuple[tuple[Kind, float], ...] = (
    ("whole", 0.4),
    ("stream", 0.4),
    ("cancel", 0.1),
    ("malformed", 0.1),
)
REQUEST_SECONDS = 300
"""Time limit of a request: one that takes longer counts as lost."""

EXTRA = {"return_token_ids": True}
"""An extension of vLLM: the answer contains the token ids of prompt and completion."""


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        text: the text.
        chat: whether it is sent to /chat/completions, else to /completions.
        max_tokens: maximum number of tokens of the answer.
        adapter: name of the LoRA adapter that answers; "" for the base model.
    """

    text: str
    chat: bool
    max_tokens: int
    adapter: str = ""


@dataclass(frozen=True)
class Request:
    """A request: `index` of a prompt of the pool, or of a malformed case."""

    kind: Kind
    index: int


@dataclass
class Answer:
    """An answer.

    Attributes:
        status: HTTP status, 0 if the connection failed.
        tokens, prompt_tokens: token ids.
        finish: the finish reason; "" for a cancelled request.
        seconds: time until the last byte.
        first: time until the first token of a stream.
        error: description of an error, "" without one.
    """

    status: int = 200
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    finish: str = ""
    seconds: float = 0.0
    first: float | None = None
    error: str = ""


def make_pool(text: str, size: int, longest: int, seed: int) -> list[Prompt]:
    """Return `size` different pieces of `text` of 3 to `longest` words, mostly short; answers are 4 to 48 tokens."""
    rng, words = random.Random(seed), text.split()
    pool = []
    for index in range(size):
        length = int(3 * (longest / 3) ** rng.random())
        start = rng.randrange(len(words) - length)
        pool.append(Prompt(" ".join(words[start : start + length]), index % 4 == 3, rng.randint(4, 48)))
    return pool


def with_adapters(pool: list[Prompt], adapters: tuple[str, ...]) -> list[Prompt]:
    """Return every prompt once for the base model and once for each adapter, one prompt after the other."""
    return [replace(prompt, adapter=name) for prompt in pool for name in ("", *adapters)]


def make_plan(count: int, pool: int, seed: int) -> list[Request]:
    """Return `count` requests in random order, with the shares of `SHARES`."""
    rng = random.Random(seed)
    plan = []
    for kind, share in SHARES:
        cases = pool if kind != "malformed" else len(MALFORMED)
        plan += [Request(kind, index % cases) for index in range(round(count * share))]
    rng.shuffle(plan)
    return plan


MALFORMED: tuple[tuple[str, dict[str, Any] | str, int], ...] = (
    ("bad JSON", '{"model": "?", "prompt": ', 400),
    ("unknown model", {"model": "no-such-model", "prompt": "a"}, 404),
    ("negative max_tokens", {"prompt": "a", "max_tokens": -1}, 400),
    ("prompt too long", {"prompt": "word " * 40000}, 400),
    ("no prompt", {"max_tokens": 4}, 400),
    ("temperature of a wrong type", {"prompt": "a", "temperature": "warm"}, 400),
    ("token id out of range", {"prompt": [2**31 - 1]}, 400),
    ("messages of a wrong type", {"messages": "hello"}, 400),
)
"""Name, body (the model's name is added if it is missing), and the expected HTTP status."""


async def send_malformed(client: AsyncOpenAI, model: str, case: int) -> Answer:
    """Post a malformed body; `error` is set unless it is refused with the expected status."""
    name, body, wanted = MALFORMED[case]
    path = "chat/completions" if isinstance(body, dict) and "messages" in body else "completions"
    content: dict[str, Any] = (
        {"content": body} if isinstance(body, str) else {"json": {"model": model, **body}}
    )
    started = time.perf_counter()
    async with httpx.AsyncClient(timeout=REQUEST_SECONDS) as raw:
        reply = await raw.post(
            f"{client.base_url}{path}", headers={"Content-Type": "application/json"}, **content
        )
    answer = Answer(reply.status_code, text=reply.text, seconds=time.perf_counter() - started)
    explained = (
        reply.headers.get("content-type", "").startswith("application/json") and "message" in reply.text
    )
    if reply.status_code != wanted or not explained:
        answer.error = (
            f"{name}: expected {wanted} with a message, found {reply.status_code}: {reply.text[:200]}"
        )
    return answer


async def send(client: AsyncOpenAI, model: str, prompt: Prompt, kind: Kind) -> Answer:
    """Send a prompt with greedy decoding: complete, streamed, or streamed and closed after half of the tokens.

    Args:
        client: the client.
        model: name of the base model.
        prompt: the prompt.
        kind: how to send it.
    """
    answer, started = Answer(), time.perf_counter()
    name = prompt.adapter or model
    options = {"model": name, "max_tokens": prompt.max_tokens, "temperature": 0, "extra_body": EXTRA}
    if prompt.chat:
        create: Any = client.chat.completions.create
        options["messages"] = [{"role": "user", "content": prompt.text}]
    else:
        create = client.completions.create
        options["prompt"] = prompt.text
    try:
        if kind == "whole":
            _add(answer, await create(**options), prompt.chat)
        else:
            stream = await create(**options, stream=True)
            async for event in stream:
                if event.choices and answer.first is None:
                    answer.first = time.perf_counter() - started
                _add(answer, event, prompt.chat)
                if kind == "cancel" and len(answer.tokens) >= max(1, prompt.max_tokens // 2):
                    await stream.close()
                    answer.finish = ""
                    break
    except APIStatusError as error:
        answer.status, answer.error = error.status_code, str(error)[:300]
    except Exception as error:  # a lost connection or a timeout is counted and does not end the run
        answer.status, answer.error = 0, f"{type(error).__name__}: {error}"[:300]
    answer.seconds = time.perf_counter() - started
    return answer


def _add(answer: Answer, event: Any, chat: bool) -> None:
    """Add a complete answer or an event of a stream to `answer`."""
    for choice in event.choices:
        if chat:
            part = getattr(choice, "delta", None) or getattr(choice, "message", None)
            answer.text += (part.content or "") if part is not None else ""
        else:
            answer.text += choice.text
        answer.tokens += getattr(choice, "token_ids", None) or []
        answer.finish = choice.finish_reason or answer.finish
        # /completions returns the prompt's ids in the choice, /chat/completions next to the choices.
        ids = getattr(choice, "prompt_token_ids", None) or getattr(event, "prompt_token_ids", None)
        answer.prompt_tokens = ids or answer.prompt_tokens
