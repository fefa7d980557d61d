"""Sample text from a language model, many sequences at a time."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass
class Script:
    """What is put into a sequence before the model continues it.

    Attributes:
        parts: token ids to put at the start of the sequence and after each end token, in turn. The first part is not
            empty.
        pending: token ids that are still to be put.
    """

    parts: Sequence[Sequence[int]]
    pending: list[int] = field(default_factory=list)
    _turn: int = 0

    def __post_init__(self) -> None:
        self.advance()

    def advance(self) -> None:
        """Put the next part after the tokens that are pending."""
        self.pending += self.parts[self._turn % len(self.parts)]
        self._turn += 1


@torch.inference_mode()
def sample_sequences(
    model: PreTrainedModel,
    scripts: Sequence[Script],
    length: int,
    tokens: tuple[Collection[int], int],
    generator: torch.Generator,
    on_token: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Sample sequences at temperature 1, all at the same time, one token in each step.

    Args:
        model: the language model.
        scripts: what each sequence starts with, and what follows an end token in it.
        length: tokens of each sequence, those of the scripts included.
        tokens: ids of the tokens that end a text, after which the script's next part follows; and the size of the
            vocabulary: no token with this id or a larger one is sampled, as the embedding may have more rows.
        generator: random numbers, on the CPU.
        on_token: called after each step with the number of tokens that each sequence has.

    Returns: token ids [S, length], on the CPU.
    """
    cache = DynamicCache(config=model.config)
    columns = [torch.tensor([script.pending.pop(0) for script in scripts])]
    ends, vocabulary = tokens
    for step in range(1, length):
        logits = model(
            input_ids=columns[-1][:, None].to(model.device), past_key_values=cache, use_cache=True
        ).logits[:, -1, :vocabulary]
        numbers = torch.rand(len(scripts), 1, generator=generator)
        sampled = _sample(logits, numbers.to(logits.device)).tolist()
        columns.append(torch.tensor(list(_next_tokens(scripts, sampled, ends))))
        on_token(step + 1)
    return torch.stack(columns, dim=1)


def _sample(logits: Tensor, numbers: Tensor) -> Tensor:
    """Return a token id [S] for logits [S, V]: the inverse of the distribution function at `numbers` [S, 1]."""
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(-1)
    found: Tensor = torch.searchsorted(cumulative, numbers * cumulative[:, -1:])[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def _next_tokens(scripts: Sequence[Script], sampled: Sequence[int], ends: Collection[int]) -> Iterator[int]:
    """Yield each sequence's next token: the script's where one is pending, else the sampled one."""
    for script, token in zip(scripts, sampled, strict=True):
        if script.pending:
            yield script.pending.pop(0)
        else:
            if token in ends:
                script.advance()
            yield token
