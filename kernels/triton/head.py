"""The 8-bit head on NVIDIA GPUs: two launches, one pass over the weights, as a torch.library op.

Triton is imported when a head first needs it, so that a machine without a GPU need not have it.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_kernels import gradients
from bwla_kernels.errors import BackendError
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.head import head_reference
from bwla_kernels.triton.gpu import can_run, gpu_properties
from bwla_kernels.triton.launch import is_dependent
from torch import Tensor

MAX_COLUMNS = (1 << 17) - 1
"""Columns up to which the 32-bit sums of either half of the codes are exact: 2^17 products of at most 2^14."""

QUANTIZE_STEP = 8192
"""Columns of a token that are quantized at once, at most."""

GROUP_M = 8
"""Token tiles that share a piece of the weights in the cache."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_LIBRARY = torch.library.Library("bwla", "FRAGMENT")
_LAYER = "Tensor weight_int8, Tensor weight_scale"
_LIBRARY.define(f"head_triton(Tensor x, {_LAYER}) -> Tensor")


@dataclass(frozen=True)
class HeadConfig:
    """One compiled form of the matmul.

    Attributes:
        block_m: tokens of a tile.
        block_n: rows of a tile.
        block_k: columns of a step.
        num_warps, num_stages: as at launch.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_n}x{self.block_m}x{self.block_k} w{self.num_warps} s{self.num_stages}"


CONFIGS = (
    # A few tokens wait for memory: long pieces of rows, and two to three steps of loads in flight.
    HeadConfig(8, 64, 256, 4, 4),
    HeadConfig(16, 64, 256, 4, 4),
    HeadConfig(32, 128, 128, 4, 4),
    HeadConfig(64, 128, 128, 8, 3),
    HeadConfig(128, 128, 64, 8, 4),
)
"""Ascending in tokens. Each fits the shared memory of compute capability 8.9 (99 KiB), and twice that of 9.0."""


def selectable(capability: tuple[int, int]) -> tuple[HeadConfig, ...]:
    """Return the configurations for a GPU.

    Only on 9.x and 10.x do tensor cores read shared memory; elsewhere the largest tile takes too many registers.
    """
    return CONFIGS if capability[0] in (9, 10) else CONFIGS[:-1]


def select_config(tokens: int, capability: tuple[int, int]) -> HeadConfig:
    """Choose the configuration for a number of tokens: the smallest tile that holds them all, else the largest.

    Rows and columns do not matter: a vocabulary has far more rows than any GPU has tiles at once.
    """
    configs = selectable(capability)
    return next((config for config in configs if tokens <= config.block_m), configs[-1])


def quantize_step(in_features: int) -> int:
    """Return the columns that `head_quantize_kernel` processes at once: a power of two."""
    return int(min(QUANTIZE_STEP, max(16, 1 << (in_features - 1).bit_length())))


def head(
    x: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    config: HeadConfig | None = None,
    pdl: bool = False,
) -> Tensor:
    """Compute the logits of x [..., K]: [..., V] in the dtype of x, equal to `head_reference` to the last bit.

    Both halves of the codes are summed exactly in int32, joined exactly in int64, rounded once to float32 and
    multiplied by the float32 product of both scales, like in the reference implementation. A token with a NaN or an
    infinity gives NaN logits (in the reference: NaN, or for an infinity also infinities).

    Args:
        x: bfloat16, float16 or float32; rows may be strided.
        weight_int8: int8 [V, K], contiguous.
        weight_scale: float32 [V].
        config: form of the matmul; by default `select_config`.
        pdl: let each launch overlap the end of the kernel before it (programmatic dependent launch, compute
            capability 9.0 or newer).

    Raises:
        BackendError: a tensor does not fit.
    """
    v, k = weight_int8.shape
    if x.dtype not in DTYPES or x.shape[-1] != k:
        raise BackendError(
            f"x: expected bfloat16, float16 or float32 [..., {k}], found {x.dtype} {list(x.shape)}"
        )
    if weight_int8.dtype != torch.int8 or not weight_int8.is_contiguous():
        raise BackendError(f"weight_int8: expected contiguous int8 [V, K], found {weight_int8.dtype}")
    if weight_scale.dtype != torch.float32 or weight_scale.shape != (v,):
        raise BackendError(
            f"weight_scale: expected float32 [{v}], found {weight_scale.dtype} {list(weight_scale.shape)}"
        )
    rows = x.reshape(-1, k)
    y = x.new_empty(*x.shape[:-1], v)
    if not y.numel():
        return y
    config = config or select_config(len(rows), gpu_properties(x.device).capability)
    codes, scale = quantize_tokens(rows if rows.stride(1) == 1 else rows.contiguous(), pdl)
    _multiply(codes, scale, weight_int8, weight_scale, y, config, pdl)
    return y


def quantize_tokens(x: Tensor, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize [M, K] as `bwla_kernels.head.quantize_tokens`, but in two halves, code = 256 high + low.

    Args:
        x: bfloat16, float16 or float32; rows may be strided.
        pdl: as in `head`.

    Returns: int8 [M, 2, K], high halves in [-127, 127], then low ones in [-128, 127]; and float32 [M], one scale a
        token. A token of zeros has scale 0 and codes 0, one with a NaN or an infinity scale NaN and codes 0.
    """
    from bwla_kernels.triton.head_kernel import head_quantize_kernel

    m, k = x.shape
    codes = x.new_empty(m, 2, k, dtype=torch.int8)
    scale = x.new_empty(m, dtype=torch.float32)
    step = quantize_step(k)
    head_quantize_kernel[(m,)](
        x,
        codes,
        scale,
        x.stride(0),
        k,
        STEP=step,
        ONE_STEP=k <= step,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=quantize_warps(step),
    )
    return codes, scale


def quantize_warps(step: int) -> int:
    """Return the warps that quantize `step` columns: 16 per thread, two 16-byte loads of 16-bit numbers."""
    return max(1, step // 512)


def _multiply(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    y: Tensor,
    config: HeadConfig,
    pdl: bool,
) -> None:
    """Launch the matmul of [M, 2, K] codes into y [..., V]."""
    from bwla_kernels.triton.head_kernel import head_matmul_kernel

    (v, k), m = weight.shape, len(scale)
    tiles = -(-m // config.block_m) * -(-v // config.block_n)
    head_matmul_kernel[(tiles,)](
        codes,
        scale,
        weight,
        weight_scale,
        y,
        m,
        v,
        k,
        **matmul_meta(k, config),
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def matmul_meta(in_features: int, config: HeadConfig) -> dict[str, int | bool]:
    """Return the compile-time arguments of `head_matmul_kernel`."""
    return {
        "BN": config.block_n,
        "BM": config.block_m,
        "BK": config.block_k,
        "EVEN": in_features % config.block_k == 0,
        "GROUP_M": GROUP_M,
    }


CHECK_ROWS = 304
"""Rows of the head that `self_check` computes: no whole tiles, but divisible by 16 as those of vLLM's heads are, so
that the code that was checked is the code that serves."""


def self_check(
    device: torch.device, dtype: torch.dtype = torch.float32, columns: int = 1024, pdl: bool = False
) -> None:
    """Compute a small head in every configuration and compare it with the reference implementation, before serving.

    Args:
        device: where the kernels run.
        dtype: of the activations.
        columns: of the head; what is compiled depends on its divisors, and on its size.
        pdl: as in `head`.

    Raises:
        BackendError: a kernel is wrong on this GPU with this Triton.
    """
    import triton

    # All is drawn on the CPU in float32, whatever the caller's default device and dtype are.
    cpu, single = torch.device("cpu"), torch.float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(CHECK_ROWS, columns, dtype=torch.int8, device=cpu).random_(
        -127, 128, generator=generator
    )
    weight_scale = torch.rand(CHECK_ROWS, generator=generator, dtype=single, device=cpu) + 0.5
    for config in selectable(gpu_properties(device).capability):
        tokens = config.block_m + 1
        x = torch.randn(tokens, columns, generator=generator, dtype=single, device=cpu).to(dtype)
        logits = head(x.to(device), weight.to(device), weight_scale.to(device), config, pdl).cpu()
        expected = head_reference(x, weight, weight_scale)
        if not torch.equal(logits, expected):
            worst = (logits.double() - expected.double()).abs().max().item()
            raise BackendError(
                f"the Triton kernel of the 8-bit head ({config}) is wrong on {device} with Triton "
                f"{triton.__version__} (largest error {worst:g}): use another backend and report this"
            )


@functools.cache
def _checked(device: torch.device, dtype: torch.dtype, columns: int, pdl: bool) -> None:
    self_check(device, dtype, columns, pdl)


def _head(x: Tensor, weight_int8: Tensor, weight_scale: Tensor) -> Tensor:
    return head(x, weight_int8, weight_scale, pdl=is_dependent(x.device))


def _head_fake(x: Tensor, weight_int8: Tensor, weight_scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_int8.shape[0])


_LIBRARY.impl("head_triton", _head, "CompositeExplicitAutograd")
torch.library.register_fake("bwla::head_triton", _head_fake, lib=_LIBRARY)
gradients.register_input_gradient(
    _LIBRARY, "head_triton", _LAYER, gradients.head_input_gradient, lambda weight, *_: weight.shape[1]
)


class TritonHead:
    """Compute the head with integer tensor cores, on NVIDIA GPUs of compute capability 8.0 or newer."""

    name = "triton"

    def can_implement(self, spec: HeadSpec, device: torch.device) -> tuple[bool, str]:
        """Return whether the kernels run on `device` and cover the head, and the reason."""
        if spec.in_features > MAX_COLUMNS:
            return False, f"sums over {spec.in_features} columns do not fit 32 bits"
        return can_run(device)

    def prepare(self, tensors: Mapping[str, Tensor], spec: HeadSpec) -> dict[str, Tensor]:
        """Return contiguous tensors; on a GPU, compile and check every kernel of this head.

        Raises:
            BackendError: a kernel computes wrong numbers with this GPU and Triton.
        """
        prepared = {
            "weight_int8": tensors["weight_int8"].contiguous(),
            "weight_scale": tensors["weight_scale"].contiguous(),
        }
        weight = prepared["weight_int8"]
        if weight.device.type == "cuda":
            dtype = torch.get_default_dtype()
            _checked(weight.device, dtype, spec.in_features, is_dependent(weight.device))
            # The kernels depend on the divisibility of these sizes too: whatever the check has not compiled.
            for config in selectable(gpu_properties(weight.device).capability):
                self.apply(weight.new_zeros(config.block_m, spec.in_features, dtype=dtype), prepared, spec)
        return prepared

    def apply(self, x: Tensor, tensors: Mapping[str, Tensor], spec: HeadSpec) -> Tensor:
        """Compute x [..., K] -> [..., V] in the dtype of x."""
        y: Tensor = torch.ops.bwla.head_triton.default(x, tensors["weight_int8"], tensors["weight_scale"])
        return y
