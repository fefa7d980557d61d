"""Check every kind of kernel once against float64, the smallest first."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from bwla_kernels.format import LayerSpec

from benchmarks.kernels.gpu.checks import check, described, limits_of
from benchmarks.kernels.gpu.journal import Case, Row
from benchmarks.kernels.gpu.layers import make_inputs, make_layer
from benchmarks.kernels.gpu.shapes import ADD_NORM, MODELS, PLAIN, SILU_MUL, Setting

INTERPRETER_CASES, INTERPRETER_TOKENS = 5, 9
"""Number of cases and maximum number of tokens in the interpreter."""


@dataclass(frozen=True)
class SmokeCase:
    """A layer and its input; `dtype` None stands for the setting's dtype."""

    step: str
    m: int
    spec: LayerSpec
    label: str = ""
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        s = self.spec
        name = self.label or f"{s.out_features}x{s.in_features} ({s.rotation_groups}, {s.n1}, {s.n2})"
        dtype = "" if self.dtype is None else f" {self.dtype}".replace("torch.", "")
        bias = " bias" if s.bias else ""
        planes = f" planes {s.planes}" if s.planes > 1 else ""
        return f"{name} rank {s.rank} bits {s.bits}{planes}{bias}{dtype}, {self.step or 'plain'}, m={self.m}"


def _spec(n: int, blocks: int, n1: int, n2: int, rank: int, bits: int = 6, bias: bool = False) -> LayerSpec:
    return LayerSpec(n, blocks * n1 * n2, blocks, n1, n2, rank=rank, bits=bits, bias=bias)


def smoke_cases(models: tuple[str, ...]) -> list[SmokeCase]:
    """Return all cases: the smallest, then each linear at few tokens, then more tokens and odd sizes."""
    small = _spec(128, 1, 16, 16, 16)
    found = [
        SmokeCase(PLAIN, 1, small),
        SmokeCase(PLAIN, 6, small),
        SmokeCase(PLAIN, 100, _spec(200, 2, 16, 16, 16, bias=True)),
        SmokeCase(PLAIN, 2, replace(small, planes=2)),
        SmokeCase(PLAIN, 100, replace(small, planes=3)),
    ]
    first, *others = models

    def of(model: str, name: str, m: int, rank: int | None = None, plain: bool = False) -> None:
        shape = MODELS[model][name]
        step = PLAIN if plain else shape.step
        found.append(SmokeCase(step, m, shape.spec(rank), f"{model} {name}"))

    names = tuple(MODELS[first])
    for m in (1, 2, 4, 8):
        for name in names:
            of(first, name, m)
    of(first, "qkv", 1, plain=True)
    for rank in (35, 48):  # ranks that are padded to a number that is not a power of two
        of(first, "qkv", 1, rank)
        of(first, "down", 6, rank)
    many = (
        ("qkv", 16),
        ("down", 32),
        ("gate_up", 64),
        ("down", 129),
        ("qkv", 300),
        ("o", 1100),
        ("qkv", 4096),
    )
    for name, m in many:
        of(first, name, m)
    for model in others:
        for name in names:
            of(model, name, 1)
    odd = (
        (PLAIN, 3, _spec(300, 31, 4, 8, 0, bits=4, bias=True), None),
        (PLAIN, 3, _spec(5000, 1, 32, 33, 5, bits=8), None),
        (PLAIN, 1, _spec(1000, 8, 10, 16, 40, bits=2), None),
        (PLAIN, 40, _spec(1000, 8, 10, 16, 40), None),
        (SILU_MUL, 5, _spec(640, 3, 24, 28, 7), None),
        (PLAIN, 4, replace(_spec(1000, 8, 10, 16, 40), planes=3), None),
        (PLAIN, 40, replace(_spec(1000, 8, 10, 16, 40), planes=4), None),
        (ADD_NORM, 2, _spec(512, 1, 64, 80, 16), torch.float16),
    )
    return found + [SmokeCase(step, m, spec, dtype=dtype) for step, m, spec, dtype in odd]


def _run(case: SmokeCase, setting: Setting, row: Row) -> None:
    dtype = case.dtype if case.dtype is not None and setting.on_gpu else setting.dtype
    m = case.m if setting.on_gpu else min(case.m, INTERPRETER_TOKENS)
    layer = make_layer(case.spec, setting.device)
    inputs = make_inputs(case.step, m, case.spec.in_features, dtype, setting.device)
    if not check(case.step, inputs, layer, row):
        row["limits"] = described(limits_of(case.step, dtype))


def cases(setting: Setting, worker: int = 0, workers: int = 1) -> Iterator[Case]:
    """Yield this worker's share of the step's cases; in the interpreter, the first ones with few tokens."""
    wanted = smoke_cases(setting.models + setting.decoded)
    if not setting.on_gpu:
        wanted = [case for case in wanted if case.spec.in_features <= 512][:INTERPRETER_CASES]
    for case in wanted[worker::workers]:
        yield Case(str(case), lambda row, case=case: _run(case, setting, row))  # type: ignore[misc]
