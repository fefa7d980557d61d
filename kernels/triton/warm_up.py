"""Compile and check at load what a request may need: Triton compiles a kernel where it first meets a configuration.

vLLM measures how much memory a model takes while this happens, and gives the KV cache the rest. So nothing here runs
as many tokens as a request may have: each configuration is given explicitly, with the few tokens of `FEW_TOKENS`. The
compiled kernel is the same, for no kernel is specialized for a number of tokens. It is for what follows from sizes
and dtypes, and for addresses and strides that are multiples of 16, which allocations and rows of a layer's width are;
an input that starts elsewhere (a slice of odd columns) would still be compiled for when it comes.
"""

import functools
from collections.abc import Mapping

import torch
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton import launch, self_check
from bwla_kernels.triton.launch import is_dependent
from bwla_kernels.triton.layer import run_layer
from bwla_kernels.triton.layout import layer_layout
from bwla_kernels.triton.prepare_config import FewConfig, InputConfig
from bwla_kernels.triton.prepare_config import select_config as select_input
from bwla_kernels.triton.prepare_input import FusedInput
from bwla_kernels.triton.tuning import BINARY, MatmulConfig, select_config
from torch import Tensor

TOKENS = (*range(1, 513), *(m + i for m in range(512, 1 << 15, 64) for i in (1, 64)))
"""Numbers of tokens among which every configuration occurs: from 512 on, the matmul's choice changes at multiples of
64 only, and the input kernel's at most once, to a configuration that is kept from there on."""

FEW_TOKENS = 8
"""Most tokens that a warm-up runs."""

_done: set[tuple[object, ...]] = set()
"""Kinds of layers that are compiled and checked."""


@functools.lru_cache(maxsize=256)
def configs(
    spec: LayerSpec, capability: tuple[int, int], multiprocessors: int
) -> Mapping[tuple[MatmulConfig, InputConfig | FewConfig], int]:
    """Return every pair of configurations that a layer can run with, and the fewest tokens that select it."""
    layout = layer_layout(spec)
    fewest: dict[tuple[MatmulConfig, InputConfig | FewConfig], int] = {}
    for m in TOKENS:
        matmul = select_config(
            *(spec.out_features, spec.in_features, spec.rotation_groups, layout.chunk, m, spec.bits),
            capability,
            multiprocessors,
            spec.planes,
        )
        fewest.setdefault((matmul, select_input(spec, m, capability)), m)
    return fewest


def warm_up(
    spec: LayerSpec,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    capability: tuple[int, int],
    multiprocessors: int,
    fused: str = self_check.PLAIN,
    norm_weight: Tensor | None = None,
) -> None:
    """Check every kernel that a layer of a new kind can run with, then run each on a few tokens of zeros.

    Args:
        spec: the layer.
        tensors: the repacked layer, from `TritonBackend.prepare`.
        dtype: of the activations.
        capability: of the GPU.
        multiprocessors: of the GPU.
        fused: what is fused into the load of the input: "", "norm", "add+norm" or "silu*mul".
        norm_weight: [K], where there is a norm.

    Raises:
        BackendError: a kernel computes wrong numbers with this GPU and this Triton, or cannot be compiled.
    """
    device, bias = tensors["weight_scale"].device, tensors.get("bias")
    bias_dtype = None if bias is None else bias.dtype
    norm_dtype = None if norm_weight is None else norm_weight.dtype
    pdl = is_dependent(device)
    kind = (spec, device, dtype, fused, norm_dtype, bias_dtype, launch.trigger(pdl))
    if kind in _done:
        return
    for (matmul, config), m in configs(spec, capability, multiprocessors).items():
        planes, tokens = matmul.kernel == BINARY, min(m, self_check.MOST_TOKENS)
        self_check.check_input(
            self_check.input_spec(spec), config, tokens, planes, dtype, fused, norm_dtype, device, pdl
        )
        self_check.check_matmul(self_check.matmul_spec(spec), matmul, dtype, bias_dtype, device, pdl)
        columns = spec.in_features * (2 if fused == self_check.SILU_MUL else 1)
        x = torch.zeros(min(m, FEW_TOKENS), columns, dtype=dtype, device=device)
        residual = torch.zeros_like(x) if fused == self_check.ADD_NORM else None
        fused_input = FusedInput(norm_weight, 1.0, residual, fused == self_check.SILU_MUL)
        run_layer(x, tensors, spec, fused_input, matmul, config)
    _done.add(kind)
