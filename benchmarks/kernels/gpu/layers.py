"""Random layers, their inputs and the calls that serving makes, without the warm-up that serving brings."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from bwla_kernels.format import LayerSpec, to_storage_dtype
from bwla_kernels.triton import launch
from bwla_kernels.triton.backend import _layer, _properties, repack
from bwla_kernels.triton.binary_matmul import Activations, binary_matmul, weights_from_tensors
from bwla_kernels.triton.launch import dependent_launch, is_dependent
from bwla_kernels.triton.prepare_input import PreparedInput, prepare_input
from bwla_kernels.triton.tuning import BINARY, MatmulConfig, select_config
from torch import Tensor

from benchmarks.kernels.gpu.shapes import ADD_NORM, SILU_MUL

EPSILON = 1e-6
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A random layer on a device.

    Attributes:
        spec: sizes.
        stored: tensors in the checkpoint's form.
        prepared: tensors in the kernels' form.
    """

    spec: LayerSpec
    stored: Tensors
    prepared: Tensors

    def copies(self, count: int) -> list[Tensors]:
        """`count` sets of prepared tensors, the first one this layer's own."""
        rest = [{name: t.clone() for name, t in self.prepared.items()} for _ in range(count - 1)]
        return [self.prepared, *rest]


@dataclass(frozen=True)
class Inputs:
    """What a layer reads: x [M, K] (before silu*mul [M, 2 K]), a norm's weight [K] and a residual [M, K]."""

    x: Tensor
    norm_weight: Tensor
    residual: Tensor


def make_layer(spec: LayerSpec, device: torch.device, seed: int = 0) -> Layer:
    """A valid layer of random contents, drawn and repacked on the device.

    Without the warm-up that serving brings: what a measurement needs is compiled when it is first called, rather than
    everything that a server may need.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n, k, r = spec.out_features, spec.in_features, spec.rank

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def rotation(order: int) -> Tensor:
        square = normal(spec.rotation_groups, order, order, dtype=torch.float64)
        factor: Tensor = torch.linalg.qr(square.cpu()).Q.to(device)
        return factor

    words = torch.randint(-(2**31), 2**31, (n, k // 32), generator=generator, device=device)
    tensors = {
        "weight_packed": words.to(torch.int32),
        "weight_scale": uniform(n) / k**0.5 + 0.01,
        "rotation_left": rotation(spec.n1),
        "rotation_right": rotation(spec.n2),
        "column_scale": uniform(k) + 0.5,
    }
    if r:
        tensors["low_rank_a"] = normal(r, k) / k**0.5
        tensors["low_rank_b"] = normal(n, r)
    if spec.bias:
        tensors["bias"] = normal(n)
    stored = to_storage_dtype(tensors, spec)
    return Layer(spec, stored, repack(stored, spec))


def make_inputs(step: str, m: int, k: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Inputs:
    """Random inputs of m tokens, some columns of which are fifteen times larger; drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(m, 2 * k if step == SILU_MUL else k, generator=generator, device=device)
    x[:, :: max(1, k // 7)] *= 15
    norm_weight = torch.rand(k, generator=generator, device=device) + 0.5
    residual = torch.randn(m, k, generator=generator, device=device)
    return Inputs(*(t.to(dtype) for t in (x, norm_weight, residual)))


def fused_options(step: str, inputs: Inputs) -> dict[str, object]:
    """Keyword arguments of `prepare_input` and of the backend for what stands before a layer."""
    if step == ADD_NORM:
        return {"norm_weight": inputs.norm_weight, "eps": EPSILON, "residual": inputs.residual}
    return {"silu_mul": True} if step == SILU_MUL else {}


def call(step: str, inputs: Inputs, tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    """What serving runs, as two launches: the layer's output, and the new residual.

    (`backend._layer` instead of the fused ops, which warm up a whole family of kernels at their first call.)
    """
    needed = ("weight_chunks", "weight_scale", "split_counters", "left_split", "right_split", "column_scale")
    layer = (
        *(tensors[name] for name in needed),
        *(tensors.get(name) for name in ("low_rank_a", "low_rank_b", "bias")),
        *(spec.out_features, spec.rotation_groups, spec.n1, spec.n2, spec.rank, spec.bits, spec.clip),
    )
    return _layer(inputs.x, *layer, **fused_options(step, inputs))  # type: ignore[arg-type]


def step_in_torch(step: str, inputs: Inputs) -> Tensor:
    """What stands before a layer, in torch with vLLM's roundings: the layer's plain input [M, K]."""
    x, norm_weight = inputs.x, inputs.norm_weight
    if step == ADD_NORM:
        total = x.float() + inputs.residual.float()
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPSILON)
        normed = normed.to(norm_weight.dtype).float() * norm_weight.float()
        return normed.to(norm_weight.dtype).to(x.dtype)
    if step == SILU_MUL:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    return x


def config_of(spec: LayerSpec, tensors: Tensors, m: int, device: torch.device) -> MatmulConfig:
    """The configuration with which serving multiplies m tokens."""
    chunk = weights_from_tensors(tensors, spec).layout.chunk
    sizes = (spec.out_features, spec.in_features, spec.rotation_groups, chunk, m, spec.bits)
    return select_config(*sizes, *_properties(device))


def input_side(step: str, inputs: Inputs, tensors: Tensors, spec: LayerSpec) -> PreparedInput:
    """The first launch alone."""
    config = config_of(spec, tensors, inputs.x.shape[0], inputs.x.device)
    return prepare_input(
        inputs.x,
        tensors,
        spec,
        planes=config.kernel == BINARY,
        chunk=weights_from_tensors(tensors, spec).layout.chunk,
        dependent_launch=is_dependent(inputs.x.device),
        **fused_options(step, inputs),  # type: ignore[arg-type]
    )


def weight_side(prepared: PreparedInput, tensors: Tensors, spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    """The second launch alone."""
    config = config_of(spec, tensors, prepared.scale.shape[0], prepared.scale.device)
    activations = Activations(prepared.q, prepared.scale, prepared.q_sum, prepared.u, prepared.planes)
    dependent = is_dependent(prepared.scale.device)
    return binary_matmul(
        activations, weights_from_tensors(tensors, spec), spec.bits, config, dtype, dependent
    )


OVERLAPS = {
    "in turn": partial(dependent_launch, False),
    "early": partial(dependent_launch, True, launch.EARLY),
    "late": partial(dependent_launch, True, launch.LATE),
}
"""How one kernel may overlap the next, see `bwla_kernels.triton.launch`: contexts by their names."""


def launches(overlap: str | None) -> AbstractContextManager[None]:
    """One of OVERLAPS as a context; None leaves launches as the kernels have them."""
    return nullcontext() if overlap is None else OVERLAPS[overlap]()


def device_is_lost(device: torch.device) -> bool:
    """Whether a kernel's failure has ended this process's use of the device."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:  # whatever CUDA raises then, there is no other answer
        return True
    return False
