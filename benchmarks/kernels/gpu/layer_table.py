"""Time each linear of a model with cold weights: the whole layer, its two launches, and cuBLAS in bf16."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.kernels.gpu.checks import check
from benchmarks.kernels.gpu.journal import Case, Row
from benchmarks.kernels.gpu.layers import (
    Inputs,
    Layer,
    Tensors,
    call,
    gemm,
    input_transform,
    make_inputs,
    make_layer,
    step_in_torch,
)
from benchmarks.kernels.gpu.shapes import MODELS, PLAIN, Setting, Shape
from benchmarks.kernels.gpu.timing import MAX_COPIES, copies_for, copy_tb_s, time_calls

FIRST_TOKENS, MORE_TOKENS = (1, 8, 64, 4096), (2, 4, 16, 256, 1024)
TINY_TOKENS = (1,)
MANY_TOKENS, MANY_COPIES = 1024, 4
"""(tokens, copies): from this number of tokens on, so few copies suffice, since computation dominates."""

Method = Callable[[int, int], Callable[[Tensor], Tensor]]
"""Function of (N, K) that returns a layer of random weights: x [M, K] -> [M, N]."""


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Return `copy_tb_s`, measured once in each process."""
    return copy_tb_s(device)


@cache
def _layer_copies(shape: Shape, device: torch.device) -> tuple[Layer, list[Tensors]]:
    layer = make_layer(shape.spec(), device)
    return layer, layer.copies(copies_for(shape.packed_bytes, device))


@cache
def _bf16_weights(n: int, k: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    count = copies_for(2 * n * k, device, 8)
    return [torch.randn(n, k, dtype=dtype, device=device) for _ in range(count)]


def measure(shape: Shape, m: int, setting: Setting, row: Row) -> None:
    """Fill a row for one linear and number of tokens.

    `fused`, `plain`: both launches, with and without the fused operation before the layer. `input`, `weight`: one
    launch alone (the input transform's tensors, less than a megabyte, stay in the cache). `bf16`: cuBLAS on the
    plain input. `bf16_ratio` is bf16 over fused, `copy_share` the packed weights' bytes over the fused time as a
    share of a copy's bandwidth.
    """
    device = setting.device
    row |= {"layer": shape.name, "n": shape.n, "k": shape.k, "m": m, "step": shape.step, "rank": shape.rank}
    row["planes"] = shape.planes
    layer, sets = _layer_copies(shape, device)
    spec = layer.spec
    inputs = make_inputs(shape.step, m, shape.k, setting.dtype, device)
    plain = Inputs(step_in_torch(shape.step, inputs).contiguous(), inputs.norm_weight, inputs.residual)
    dense = _bf16_weights(shape.n, shape.k, device, setting.dtype)
    calls = [partial(torch.nn.functional.linear, plain.x, weight) for weight in dense]
    bf16 = time_calls(calls, device).into(row, "bf16")
    check(shape.step, inputs, layer, row)
    sets = sets[: MANY_COPIES if m >= MANY_TOKENS else MAX_COPIES]
    prepared = input_transform(PLAIN, plain, layer.prepared, spec)

    def timed(name: str, function: Callable[..., object]) -> float:
        return time_calls([partial(function, tensors) for tensors in sets], device).into(row, name)

    fused = timed("fused", lambda tensors: call(shape.step, inputs, tensors, spec))
    timed("plain", lambda tensors: call(PLAIN, plain, tensors, spec))
    timed("weight", lambda tensors: gemm(prepared, tensors, spec, setting.dtype))
    timed("input", lambda tensors: input_transform(shape.step, inputs, tensors, spec))
    packed = shape.packed_bytes
    row["packed_tb_s"] = packed / fused / 1e6
    row["weight_tb_s"] = packed / row["weight_us"] / 1e6
    row["copy_share"] = row["packed_tb_s"] / copy_bandwidth(device)
    row["tops"] = 2 * m * shape.n * shape.k / fused / 1e6
    row["bf16_ratio"] = bf16 / fused


def measure_method(make: Method, bits: float, shape: Shape, m: int, setting: Setting) -> float:
    """Return the median microseconds of another method's layer with cold weights.

    Raises:
        RuntimeError: the result has a wrong shape or dtype, is not finite, is zero everywhere or changes between calls.
    """
    x = make_inputs(PLAIN, m, shape.k, setting.dtype, setting.device).x
    count = copies_for(bits * shape.n * shape.k / 8, setting.device, 16)
    layers = [make(shape.n, shape.k) for _ in range(count)]
    y, again = layers[0](x), layers[0](x)
    if y.shape != (m, shape.n) or y.dtype != x.dtype:
        raise RuntimeError(f"expected {x.dtype} [{m}, {shape.n}], found {y.dtype} {list(y.shape)}")
    if not y.isfinite().all() or not y.any() or not torch.equal(y, again):
        raise RuntimeError("expected the same finite, nonzero result in each call, found another")
    return time_calls([partial(layer, x) for layer in layers], setting.device).median


def order(setting: Setting) -> Iterator[tuple[str, Shape, int]]:
    """Yield (model, shape, tokens), most important first: decode, then the other usual numbers of tokens, the rest."""
    rounds = (FIRST_TOKENS[:1], FIRST_TOKENS[1:], MORE_TOKENS) if setting.on_gpu else (TINY_TOKENS,)
    for tokens in rounds:
        for model in setting.models + setting.decoded * (tokens == rounds[0]):
            for m in tokens:
                for shape in list(MODELS[model].values())[:: 1 if setting.on_gpu else 3]:
                    yield model, shape, m


def cases(setting: Setting) -> Iterator[Case]:
    """Return the step's cases."""

    def run(row: Row, model: str, shape: Shape, m: int) -> None:
        row["model"] = model
        measure(shape, m, setting, row)

    for model, shape, m in order(setting):
        yield Case(f"{model} {shape.name} m={m}", partial(run, model=model, shape=shape, m=m))
