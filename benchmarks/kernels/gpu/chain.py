"""Time the linears of a decode step one after another, which gives an upper bound of tokens per second.

Attention is left out: o_proj reads q directly. Norms, the residual and SiLU * mul are as in the model.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.kernels.gpu.journal import Case, Row
from benchmarks.kernels.gpu.layers import OVERLAPS, Inputs, Tensors, call, launches, make_inputs, make_layer
from benchmarks.kernels.gpu.shapes import DECODER_LAYERS, MODELS, VOCABULARY, Setting, base_name
from benchmarks.kernels.gpu.timing import time_calls, time_events

BLOCKS = {model: 1 if base_name(model) == "tiny" else 8 for model in MODELS}
"""Decoder layers in one graph; their weights are several times larger than the L2 cache."""

KERNELS_SHOWN = 14
PROFILED_STEPS = 5
Block = dict[str, Tensors]


@cache
def _blocks(model: str, device: torch.device) -> tuple[Block, ...]:
    """Return the prepared tensors of several decoder layers, which are copies of one."""
    made = {name: make_layer(shape.spec(), device) for name, shape in MODELS[model].items()}
    copies = {name: layer.copies(BLOCKS[model]) for name, layer in made.items()}
    return tuple({name: sets[i] for name, sets in copies.items()} for i in range(BLOCKS[model]))


class Decoder:
    """The linears of several decoder layers, for m tokens."""

    def __init__(self, model: str, m: int, setting: Setting) -> None:
        self.shapes = MODELS[model]
        self.specs = {name: shape.spec() for name, shape in self.shapes.items()}
        self.blocks = _blocks(model, setting.device)
        hidden = self.shapes["qkv"].k
        start = make_inputs(self.shapes["qkv"].step, m, hidden, setting.dtype, setting.device)
        self.x, self.norm_weight, self.residual = start.x, start.norm_weight, start.residual

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the last layer's output and the residual, both [M, hidden]."""
        x, residual = self.x, self.residual
        for block in self.blocks:
            qkv, residual = self._normed("qkv", block, x, residual)
            attended = qkv[:, : self.shapes["o"].k]
            x = self._call("o", block, attended, residual)[0]
            gate_up, residual = self._normed("gate_up", block, x, residual)
            x = self._call("down", block, gate_up, residual)[0]
        return x, residual

    def _normed(self, name: str, block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, total = self._call(name, block, x, residual)
        assert total is not None
        return y, total

    def _call(self, name: str, block: Block, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs = Inputs(x, self.norm_weight, residual)
        return call(self.shapes[name].step, inputs, block[name], self.specs[name])


def _measure(row: Row, model: str, m: int, overlap: str | None, setting: Setting) -> None:
    """Time a decoder layer with one of `layers.OVERLAPS` (None: the default), and compare it with launches in turn."""
    row |= {"model": model, "m": m, "launches": overlap or "as they are"}
    with launches("in turn"):
        decode = Decoder(model, m, setting)
        wanted, residual = decode()
    with launches(overlap):
        found, total = decode()
        row["finite"] = bool(found.isfinite().all())
        row["ok"] = row["finite"] and torch.equal(found, wanted) and torch.equal(total, residual)
        count = len(decode.blocks)
        row["layer_us"] = time_calls([decode], setting.device).into(row, "step") / count
    row["linears_ms"] = row["layer_us"] * DECODER_LAYERS[model] / 1e3


def _profile(row: Row, model: str, overlap: str, setting: Setting) -> None:
    """Profile a decode step: mean microseconds of each kernel."""
    decode = Decoder(model, 1, setting)
    with launches(overlap):
        decode()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(PROFILED_STEPS):
                decode()
            torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)[:KERNELS_SHOWN]
    row["kernels"] = [
        [event.key[:60], event.count, event.device_time_total / max(event.count, 1)] for event in found
    ]


@cache
def _head(model: str, device: torch.device) -> dict[str, Tensor]:
    v, k = VOCABULARY[model], MODELS[model]["qkv"].k
    generator = torch.Generator(device).manual_seed(0)
    codes = torch.randint(-127, 128, (v, k), dtype=torch.int8, device=device, generator=generator)
    return {"weight_int8": codes, "weight_scale": torch.rand(v, device=device, generator=generator) / 1e3}


def _measure_head(row: Row, kind: str, model: str, m: int, setting: Setting) -> None:
    """Time a language-model head that exceeds the caches: `bf16`, int8 with `torch`, or int8 with `triton`.

    An int8 head is compared with the reference implementation on rows at both ends of the vocabulary.
    """
    from bwla_kernels.format.head import HeadSpec
    from bwla_kernels.head import TorchHead, head_reference
    from bwla_kernels.ops import HeadBackend

    v, k = VOCABULARY[model], MODELS[model]["qkv"].k
    row |= {"model": model, "m": m, "head": kind, "v": v, "k": k}
    x = make_inputs("", m, k, setting.dtype, setting.device).x
    if kind == "bf16":
        weight = torch.randn(v, k, dtype=setting.dtype, device=setting.device)
        head = partial(torch.nn.functional.linear, x, weight)
        row["ok"] = bool(head().isfinite().all())
    else:
        backend: HeadBackend = TorchHead()
        if kind == "triton":
            from bwla_kernels.triton.head import TritonHead

            backend = TritonHead()
        tensors = _head(model, setting.device)
        prepared = backend.prepare(tensors, HeadSpec(v, k))
        head = partial(backend.apply, x, prepared, HeadSpec(v, k))
        y = head()
        ends = torch.cat([torch.arange(0, 128), torch.arange(v - 128, v)]).to(setting.device)
        part = {name: tensor[ends] for name, tensor in tensors.items()}
        row["ok"] = torch.equal(y[:, ends], head_reference(x, part["weight_int8"], part["weight_scale"]))
    if kind == "torch" and setting.on_gpu:  # it synchronizes, so it cannot be captured in a graph
        time_events(head).into(row, "head")
    else:
        time_calls([head], setting.device).into(row, "head")


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the step's cases: decode with every kind of overlap, a profile without, heads, more tokens, then planes."""
    for model in setting.models:
        for m in (1, 8) if setting.on_gpu else (1,):
            ways = [None, *(OVERLAPS if m == 1 else ("in turn",))] if setting.on_gpu else [None]
            for overlap in ways:
                run = partial(_measure, model=model, m=m, overlap=overlap, setting=setting)
                yield Case(f"{model} m={m} {overlap or 'as it is'}", run)
            if m == 1 and setting.on_gpu:
                yield Case(
                    f"{model} profile", partial(_profile, model=model, overlap="in turn", setting=setting)
                )
            for kind in ("triton", "bf16", "torch"):
                if kind != "torch" or m == 1:
                    run = partial(_measure_head, kind=kind, model=model, m=m, setting=setting)
                    yield Case(f"{model} head {kind} m={m}", run)
    for model in setting.decoded:
        run = partial(_measure, model=model, m=1, overlap=None, setting=setting)
        yield Case(f"{model} m=1 as it is", run)
