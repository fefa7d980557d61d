"""Build Triton's compile cache for an H100 or H200 on a machine without one, by launching the kernels.

A fake driver reports the target GPU, and every launch stops when its kernel is compiled. The cache's keys hash the
kernels' sources, Triton itself and the arguments' types, so a cache is valid only for these sources and this release
of Triton. Tensors are on the CPU and nothing is computed.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from bwla_kernels.triton import launch, self_check, tune, warm_up
from bwla_kernels.triton.binary_matmul import binary_matmul
from bwla_kernels.triton.layout import ChunkLayout
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.kernels.gpu import layer_table, tune_day
from benchmarks.kernels.gpu.cache import SOURCES_FILE, sources_digest
from benchmarks.kernels.gpu.layers import OVERLAPS, Inputs, call, launches, make_layer
from benchmarks.kernels.gpu.shapes import ADD_NORM, GPU, MODELS, PLAIN, SILU_MUL, VOCABULARY, Setting
from benchmarks.kernels.gpu.smoke import SmokeCase, smoke_cases

CAPABILITY, MULTIPROCESSORS = 90, 132
"""Compute capability of the H100 and the H200."""

FUSED = {ADD_NORM: ("", "norm", "add+norm"), SILU_MUL: ("", "silu*mul"), PLAIN: ("",)}
"""Operations that vLLM's compiler may fuse into a layer."""

Job = tuple[str, Callable[[], object]]


class NoGpu:
    """The part of a driver that compilation needs."""

    @staticmethod
    def get_current_device() -> int:
        """Return the only device."""
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        """Return a stream that runs nothing."""
        return 0

    @staticmethod
    def get_current_target() -> GPUTarget:
        """Return the target GPU."""
        return GPUTarget("cuda", CAPABILITY, 32)

    @staticmethod
    def get_active_torch_device() -> torch.device:
        """Return the tensors' device."""
        return torch.device("cpu")


def stand_in() -> None:
    """Make every launch in this process only compile for the GPU; self-checks ignore the results."""
    driver.set_active(NoGpu())
    launch_and_run = JITFunction.run

    def compile_only(self: Any, *arguments: object, grid: object, warmup: bool, **options: object) -> object:
        return launch_and_run(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    self_check._fail = lambda *_: None
    self_check.input_problem = lambda *_: None
    for name, module in list(sys.modules.items()):
        if name.startswith(("bwla_kernels.", "gpu.")) and hasattr(module, "is_dependent"):
            module.is_dependent = lambda device: launch.trigger(True) != launch.OFF  # type: ignore[attr-defined]


def _empty_inputs(step: str, m: int, k: int, dtype: torch.dtype) -> Inputs:
    x = torch.empty(m, 2 * k if step == SILU_MUL else k, dtype=dtype)
    return Inputs(x, torch.empty(k, dtype=dtype), torch.empty(m, k, dtype=dtype))


def _compile_layer(case: SmokeCase) -> None:
    """Launch both kernels with and without dependent launches, fused and plain."""
    layer = make_layer(case.spec, torch.device("cpu"))
    dtype = case.dtype or torch.bfloat16
    for step in dict.fromkeys((case.step, PLAIN)):
        inputs = _empty_inputs(step, case.m, case.spec.in_features, dtype)
        for overlap in OVERLAPS if case.m == 1 else ("in turn", "early"):
            with launches(overlap):
                call(step, inputs, layer.prepared, case.spec)


def _compile_tuning(layout: ChunkLayout, m: int) -> None:
    """Launch the first round of a shape's tuning."""
    problem = tune.draw(layout, m, torch.device("cpu"), 1)
    for config in tune.candidates(layout, m, divmod(CAPABILITY, 10), MULTIPROCESSORS):
        with suppress(triton.TritonError):  # the tuning reports the same error
            binary_matmul(problem.prepared, problem.weights[0], tune.BITS, config, problem.dtype)


def _compile_head(model: str, m: int) -> None:
    from bwla_kernels.format.head import HeadSpec
    from bwla_kernels.triton.head import TritonHead

    v, k = VOCABULARY[model], MODELS[model]["qkv"].k
    stored = {"weight_int8": torch.empty(v, k, dtype=torch.int8), "weight_scale": torch.empty(v)}
    for overlap in ("in turn", "early"):
        with launches(overlap):
            TritonHead().apply(torch.empty(m, k, dtype=torch.bfloat16), stored, HeadSpec(v, k))


def day_jobs(setting: Setting = GPU) -> Iterator[Job]:
    """Yield the launches of `gpu_day.py`, most important first, except for the second rounds of tuning."""
    for case in smoke_cases(setting.models + setting.decoded):
        yield f"smoke {case}", partial(_compile_layer, case)
    for model, shape, m in layer_table.order(setting):
        case = SmokeCase(shape.step, m, shape.spec(), f"{model} {shape.name}")
        yield f"layer {case}", partial(_compile_layer, case)
    for model in setting.models:
        for m in (1, 8):
            yield f"head {model} m={m}", partial(_compile_head, model, m)
    for model, shape, m in tune_day.order(setting):
        yield f"tune {model} {shape.name} m={m}", partial(_compile_tuning, tune_day.layout_of(shape), m)


def _compile_served(model: str, name: str, fused: str) -> None:
    shape = MODELS[model][name]
    spec = shape.spec()
    prepared = make_layer(spec, torch.device("cpu")).prepared
    norm = torch.ones(shape.k, dtype=torch.bfloat16) if "norm" in fused else None
    warm_up.warm_up(
        spec,
        prepared,
        torch.bfloat16,
        divmod(CAPABILITY, 10),
        MULTIPROCESSORS,
        fused=fused,
        norm_weight=norm,
    )


def serve_jobs(models: tuple[str, ...]) -> Iterator[Job]:
    """Yield the launches of vLLM's start for each model: the warm-up of every kind of layer, plain and fused."""
    for model in models:
        for name, shape in MODELS[model].items():
            for fused in FUSED[shape.step]:
                yield f"serve {model} {name} {fused or 'plain'}", partial(_compile_served, model, name, fused)
        for m in (1, 8, 64):
            yield f"serve {model} head m={m}", partial(_compile_head, model, m)


def describe(folder: Path, commit: str) -> None:
    """Write the digest, commit and versions that the cache is for into its folder."""
    facts = {"sources": sources_digest(), "commit": commit, "triton": triton.__version__, "sm": CAPABILITY}
    (folder / SOURCES_FILE).write_text(json.dumps(facts) + "\n", encoding="utf-8")
