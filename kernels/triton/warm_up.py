"""Compile at load what a request may need: Triton compiles a kernel where it first meets a configuration."""

import functools
from collections.abc import Callable, Iterator

import torch
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton import prepare_input
from bwla_kernels.triton.binary_matmul import self_check
from bwla_kernels.triton.layout import chunk_layout
from bwla_kernels.triton.tuning import MatmulConfig, select_config
from torch import Tensor

TOKENS = (1, 2, 3, *(1 << i for i in range(2, 14)))
"""Numbers of tokens among which every configuration occurs."""


def configs(
    spec: LayerSpec, capability: tuple[int, int], multiprocessors: int
) -> dict[tuple[MatmulConfig, prepare_input.InputConfig], int]:
    """Every pair of configurations that a layer can run with, and the fewest tokens that select it."""
    layout = chunk_layout(spec.out_features, spec.blocks, spec.block_width)
    found: dict[tuple[MatmulConfig, prepare_input.InputConfig], int] = {}
    for m in TOKENS:
        matmul = select_config(
            *(spec.out_features, spec.in_features, spec.blocks, layout.chunk, m, spec.bits),
            capability,
            multiprocessors,
        )
        found.setdefault((matmul, prepare_input.select_config(spec, m, capability)), m)
    return found


@functools.cache
def _once(spec: LayerSpec, device: torch.device, dtype: torch.dtype, fused: str) -> Iterator[None]:
    """An iterator that is exhausted once it was walked: what is done in it is done once a process."""
    return iter((None,))


@functools.cache
def _checked(config: MatmulConfig, device: torch.device) -> None:
    self_check(device, [config])


def warm_up(
    spec: LayerSpec,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int],
    multiprocessors: int,
    apply: Callable[[Tensor], Tensor],
    fused: str = "",
    columns: int | None = None,
) -> None:
    """Run a layer of a new kind once with every configuration, and check each matmul against plain torch.

    Args:
        spec: the layer.
        device: its GPU.
        dtype: of the activations to come.
        capability: of the GPU.
        multiprocessors: of the GPU.
        apply: x [M, columns] -> [M, N].
        fused: what is fused into the load of x.
        columns: of x; None for the layer's width.

    Raises:
        BackendError: a kernel computes wrong numbers with this GPU and this Triton.
    """
    for _ in _once(spec, device, dtype, fused):
        for (matmul, _), m in configs(spec, capability, multiprocessors).items():
            _checked(matmul, device)
            apply(torch.zeros(m, columns or spec.in_features, dtype=dtype, device=device))
