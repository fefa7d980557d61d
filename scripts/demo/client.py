"""What the demo asks a server through the `openai` client: an answer, the speed, and the perplexity."""

import math
import time
from collections.abc import Iterator
from typing import Any

from openai import OpenAI
from torch import Tensor

from benchmarks.common.server import Server
from scripts.demo.models import DemoError

ANSWER_TOKENS = 48
SPEED_TOKENS = 96


class Client:
    """A client of one server, for the prompts of one model.

    Attributes:
        server: the server.
        chat: whether prompts go to the chat endpoint.
    """

    def __init__(self, server: Server, chat: bool) -> None:
        self.server, self.chat = server, chat
        self._openai = OpenAI(base_url=server.url, api_key="none", max_retries=0)

    def answer(self, prompt: str) -> str:
        """Print the streamed answer to a prompt, and return it.

        Raises:
            DemoError: it is empty, or differs from what the same request answers at once.
        """
        pieces = []
        for piece in self._streamed(prompt):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
        answer = "".join(pieces)
        text, logprobs = self._whole(prompt)
        if not answer.strip():
            raise DemoError("the answer is empty")
        if answer != text:
            raise DemoError(
                f"expected the same answer in one piece at temperature 0, found {text!r} after {answer!r}"
            )
        if not logprobs or not all(value <= 0 for value in logprobs):
            raise DemoError(f"expected finite log probabilities of at most 0, found {logprobs}")
        return answer

    def tokens_per_second(self, prompt: str) -> float:
        """Return the decoding speed of one request, from its first token to its last."""
        events = self._openai.completions.create(
            model=self.server.model,
            prompt=prompt,
            max_tokens=SPEED_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        times = [time.perf_counter() for _ in events]
        return (SPEED_TOKENS - 1) / (times[-1] - times[0])

    def perplexity(self, windows: Tensor) -> float:
        """Return the perplexity on windows of token ids [W, T], from the log probabilities of the prompts' tokens.

        Every token but the first of a window is predicted from those before it, as `bwla-eval` does.
        """
        total, count = 0.0, 0
        for window in windows.tolist():
            reply = self._openai.completions.create(
                model=self.server.model, prompt=window, max_tokens=1, temperature=0, echo=True, logprobs=0
            )
            values = _logprobs(reply.choices[0])[1 : len(window)]
            total -= sum(values)
            count += len(values)
        return math.exp(total / count)

    def _request(self, prompt: str, **more: Any) -> Any:
        options: dict[str, Any] = {"model": self.server.model, "temperature": 0, "max_tokens": ANSWER_TOKENS}
        if self.chat:
            messages: Any = [{"role": "user", "content": prompt}]
            return self._openai.chat.completions.create(messages=messages, **options, **more)
        return self._openai.completions.create(prompt=prompt, **options, **more)

    def _streamed(self, prompt: str) -> Iterator[str]:
        for event in self._request(prompt, stream=True):
            choice = event.choices[0]
            yield (choice.delta.content if self.chat else choice.text) or ""

    def _whole(self, prompt: str) -> tuple[str, list[float]]:
        choice = self._request(prompt, logprobs=True if self.chat else 0).choices[0]
        if self.chat:
            return choice.message.content or "", [token.logprob for token in choice.logprobs.content]
        return choice.text, _logprobs(choice)


def _logprobs(choice: Any) -> list[float]:
    """Return the log probabilities of a completion's tokens."""
    values: list[float] = choice.logprobs.token_logprobs
    return values
