"""Fixtures of the CPU kernel's tests: the variants that this processor runs, and shapes to run them on."""

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from bwla_kernels.cpu.library import Isa, available, load
from bwla_kernels.format import LayerSpec
from torch import Tensor

Case = tuple[LayerSpec, int, int]
"""A layer, a number of tokens and a number of threads (negative: exactly so many)."""


def supported() -> list[Isa]:
    """The variants that this processor runs; the scalar one alone where the kernel is not built (and skipped)."""
    if not available()[0]:
        return [Isa.SCALAR]
    return [isa for isa in Isa if load().handle.bwla_isa_supported(isa)]


@pytest.fixture(autouse=True)
def _kernel() -> None:
    able, reason = available()
    if not able:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """The oracles are small: on a busy machine threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=supported(), ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> Isa:
    """Each variant in turn."""
    return request.param


@pytest.fixture(scope="session")
def variants() -> list[Isa]:
    """All of them."""
    return supported()


def random_cases(seed: int, count: int) -> Iterator[Case]:
    """Shapes of all kinds: ragged N, any factors, several blocks, ranks, bits, tokens and threads; some are grouped."""
    rng = random.Random(seed)
    for _ in range(count):
        blocks, words = rng.choice([1, 1, 1, 2, 3, 5]), rng.choice([1, 1, 2, 3, 4, 7, 12])
        width = 32 * words
        grouped = rng.random() < 0.3
        n1 = 1 if grouped else rng.choice([d for d in range(1, width + 1) if width % d == 0])
        spec = LayerSpec(
            rng.randint(1, 200),
            blocks * width,
            blocks,
            n1,
            width // n1,
            rank=0 if grouped else rng.choice([0, 0, 1, 3, 4, 5, 16]),
            bits=rng.randint(2, 8),
            clip=rng.choice([1.0, 0.85]),
            planes=rng.choice([1, 1, 2, 3, 4]),
            grouped=grouped,
        )
        yield (
            spec,
            rng.choice([1, 1, 2, 3, 4, 5, 8, 13, rng.randint(1, 70)]),
            rng.choice([-1, -1, -1, -2, -5]),
        )


@pytest.fixture(scope="session")
def cases() -> Callable[[int, int], Iterator[Case]]:
    """`cases(seed, count)` -> that many random shapes."""
    return random_cases


def random_codes(spec: LayerSpec, tokens: int, generator: torch.Generator) -> Tensor:
    """int8 [tokens, K] over the whole range of codes, some rows all zero, some all at a limit."""
    q = torch.randint(-spec.q_max, spec.q_max + 1, (tokens, spec.in_features), generator=generator)
    kind = torch.randint(0, 8, (tokens,), generator=generator)
    q[kind == 0] = 0
    q[kind == 1] = spec.q_max
    q[kind == 2] = -spec.q_max
    return q.to(torch.int8)


@pytest.fixture(scope="session")
def make_codes() -> Callable[[LayerSpec, int, torch.Generator], Tensor]:
    """`make_codes(spec, tokens, generator)` -> int8 codes that fit the spec."""
    return random_codes
