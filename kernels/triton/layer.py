"""One BWLA layer as two launches: the input transform, then the GEMM."""

from collections.abc import Mapping
from dataclasses import replace

from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.binary_matmul import binary_matmul, weights_from_tensors
from bwla_kernels.triton.gpu import gpu_properties
from bwla_kernels.triton.launch import is_dependent
from bwla_kernels.triton.prepare_config import FewConfig, InputConfig
from bwla_kernels.triton.prepare_input import NOTHING_FUSED, FusedInput, prepare_input
from bwla_kernels.triton.tuning import BINARY, MatmulConfig, select_config
from torch import Tensor


def run_layer(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    spec: LayerSpec,
    fused: FusedInput = NOTHING_FUSED,
    matmul_config: MatmulConfig | None = None,
    input_config: InputConfig | FewConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute a layer's output, and x + residual where a residual is fused.

    Args:
        x: [..., K], or [..., 2 K] where SiLU * mul is fused; bfloat16, float16 or float32.
        tensors: the repacked layer (`backend.repack`).
        spec: its sizes.
        fused: what is computed where x is loaded; a residual is shaped like x.
        matmul_config: how to multiply; by default as `tuning.select_config` chooses.
        input_config: how to cut the input transform; by default as `prepare_config.select_config` chooses.

    Returns: [..., N] in the dtype of x, and the sum in the shape of x, or None.
    """
    rows = as_rows(x, spec.in_features * (2 if fused.silu_mul else 1))
    if fused.residual is not None:
        fused = replace(fused, residual=as_rows(fused.residual, spec.in_features))
    weights = weights_from_tensors(tensors, spec)
    chunk = weights.layout.chunk
    matmul_config = matmul_config or select_config(
        *(spec.out_features, spec.in_features, spec.rotation_groups, chunk, len(rows), spec.bits),
        *gpu_properties(x.device),
        planes=spec.planes,
    )
    dependent = is_dependent(x.device)
    prepared = prepare_input(
        rows,
        tensors,
        spec,
        planes=matmul_config.kernel == BINARY,
        chunk=chunk,
        fused=fused,
        config=input_config,
        dependent_launch=dependent,
    )
    y = binary_matmul(prepared, weights, spec.bits, matmul_config, x.dtype, dependent)
    y = y.reshape(*x.shape[:-1], spec.out_features)
    return y, None if prepared.residual is None else prepared.residual.reshape(x.shape)


def as_rows(x: Tensor, width: int) -> Tensor:
    """Return x [..., width] as [M, width] with adjacent columns, without a copy where strides permit it."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()
