"""Random layers, their inputs, and the calls that serving makes, without serving's warm-up."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from bwla_kernels.format import LayerSpec, to_storage_dtype
from bwla_kernels.triton import launch
from bwla_kernels.triton.backend import repack
from bwla_kernels.triton.binary_matmul import binary_matmul, weights_from_tensors
from bwla_kernels.triton.gpu import gpu_properties
from bwla_kernels.triton.launch import dependent_launch, is_dependent
from bwla_kernels.triton.layer import run_layer
from bwla_kernels.triton.prepare_input import NOTHING_FUSED, FusedInput, QuantizedInput, prepare_input
from bwla_kernels.triton.tuning import BINARY, MatmulConfig, select_config
from torch import Tensor

from benchmarks.kernels.gpu.shapes import ADD_NORM, SILU_MUL

EPSILON = 1e-6
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A random layer on a device.

    Attributes:
        spec: the layer's sizes.
        stored: tensors as in a checkpoint.
        prepared: tensors as the kernels read them.
    """

    spec: LayerSpec
    stored: Tensors
    prepared: Tensors

    def copies(self, count: int) -> list[Tensors]:
        """Return `count` sets of prepared tensors, the first of which is this layer's own."""
        rest = [{name: t.clone() for name, t in self.prepared.items()} for _ in range(count - 1)]
        return [self.prepared, *rest]


@dataclass(frozen=True)
class Inputs:
    """Inputs of a layer: x [M, K] (before SiLU * mul [M, 2 K]), a norm's weight [K] and a residual [M, K]."""

    x: Tensor
    norm_weight: Tensor
    residual: Tensor


def make_layer(spec: LayerSpec, device: torch.device, seed: int = 0) -> Layer:
    """Return a valid layer with random contents, drawn and repacked on the device.

    There is no warm-up: a measurement compiles only the kernels that it calls, a server all that it may need.
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

    row = (n,) if spec.planes == 1 else (n, spec.planes)
    words = torch.randint(-(2**31), 2**31, (*row, k // 32), generator=generator, device=device)
    tensors = {
        "weight_packed": words.to(torch.int32),
        "weight_scale": uniform(*row) / k**0.5 + 0.01,
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
    """Return random inputs of m tokens with some columns fifteen times larger, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(m, 2 * k if step == SILU_MUL else k, generator=generator, device=device)
    x[:, :: max(1, k // 7)] *= 15
    norm_weight = torch.rand(k, generator=generator, device=device) + 0.5
    residual = torch.randn(m, k, generator=generator, device=device)
    return Inputs(*(t.to(dtype) for t in (x, norm_weight, residual)))


def fused_input(step: str, inputs: Inputs) -> FusedInput:
    """Return what is fused into the load of a layer's input for `step`."""
    if step == ADD_NORM:
        return FusedInput(inputs.norm_weight, EPSILON, inputs.residual)
    return FusedInput(silu_mul=True) if step == SILU_MUL else NOTHING_FUSED


def call(step: str, inputs: Inputs, tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor | None]:
    """Run the two launches that serving runs; return the layer's output and the new residual.

    This calls `run_layer`, because the fused ops warm up a whole family of kernels in their first call.
    """
    return run_layer(inputs.x, tensors, spec, fused_input(step, inputs))


def step_in_torch(step: str, inputs: Inputs) -> Tensor:
    """Compute the operation before a layer in torch with vLLM's roundings; return the layer's plain input [M, K]."""
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
    """Return the GEMM configuration that serving uses for m tokens."""
    chunk = weights_from_tensors(tensors, spec).layout.chunk
    sizes = (spec.out_features, spec.in_features, spec.rotation_groups, chunk, m, spec.bits)
    return select_config(*sizes, *gpu_properties(device), planes=spec.planes)


def input_transform(step: str, inputs: Inputs, tensors: Tensors, spec: LayerSpec) -> QuantizedInput:
    """Run the first launch alone."""
    config = config_of(spec, tensors, inputs.x.shape[0], inputs.x.device)
    return prepare_input(
        inputs.x,
        tensors,
        spec,
        planes=config.kernel == BINARY,
        chunk=weights_from_tensors(tensors, spec).layout.chunk,
        dependent_launch=is_dependent(inputs.x.device),
        fused=fused_input(step, inputs),
    )


def gemm(prepared: QuantizedInput, tensors: Tensors, spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    """Run the second launch alone."""
    config = config_of(spec, tensors, prepared.scale.shape[0], prepared.scale.device)
    dependent = is_dependent(prepared.scale.device)
    return binary_matmul(prepared, weights_from_tensors(tensors, spec), spec.bits, config, dtype, dependent)


OVERLAPS = {
    "in turn": partial(dependent_launch, False),
    "early": partial(dependent_launch, True, launch.EARLY),
    "late": partial(dependent_launch, True, launch.LATE),
}
"""Name -> context that sets how a kernel may overlap the next, see `bwla_kernels.triton.launch`."""


def launches(overlap: str | None) -> AbstractContextManager[None]:
    """Return one of OVERLAPS as a context; None keeps the kernels' default."""
    return nullcontext() if overlap is None else OVERLAPS[overlap]()


def device_is_lost(device: torch.device) -> bool:
    """Return whether a failed kernel has made the device unusable for this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception:  # any error of CUDA here means a lost device
        return True
    return False
