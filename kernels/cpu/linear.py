"""The CPU kernel's functions on torch tensors: repack a layer once, then compute it, whole or in two steps."""

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from bwla_kernels import checks
from bwla_kernels.cpu.library import Isa, LayerStruct, available, load
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import UNQUANTIZED_BITS, storage_dtype, tensor_specs, to_compute_dtype
from torch import Tensor

CPU = torch.device("cpu")

HUGE_PAGE = 2 << 20

PANEL_ROWS = 64
"""Rows that lie together in a packed layer (layout.h)."""

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""The library's numbers for dtypes."""

PACKED_TENSORS = (
    "weight_packed", "weight_scale", "low_rank_b",
    "rotation_left", "rotation_right", "column_scale", "low_rank_a",
)  # fmt: skip
"""Stored tensors in the order in which the library takes them to pack a layer."""

STATUS = {1: "its sizes are invalid", 2: "out of memory", 3: "this processor lacks the instruction set"}


@dataclass(frozen=True)
class _Layer:
    """A spec for the library; `address` is the address of `struct`, `size` the bytes of the packed layer."""

    struct: LayerStruct
    address: int
    size: int


def layer_struct(spec: LayerSpec, isa: Isa | None) -> LayerStruct:
    """Return the sizes of a layer as the library reads them; `isa` None is the variant in use."""
    return LayerStruct(
        load().isa if isa is None else isa,
        spec.bits,
        spec.out_features,
        spec.rotation_groups,
        spec.n1,
        spec.n2,
        spec.rank,
        spec.planes,
        spec.clip,
        spec.grouped,
    )


@functools.lru_cache(maxsize=4096)
def _layer(spec: LayerSpec, isa: Isa | None) -> _Layer:
    struct = layer_struct(spec, isa)
    address = ctypes.addressof(struct)
    return _Layer(struct, address, load().handle.bwla_packed_bytes(address))


def _check(status: int, spec: LayerSpec) -> None:
    if status:
        raise BackendError(f"the CPU kernel refused {spec}: {STATUS.get(status, f'status {status}')}")


def expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise BackendError unless a tensor has the dtype, shape and layout that the library reads through its pointer."""
    checks.expect(name, tensor, dtype, shape, CPU)


def can_implement(spec: LayerSpec) -> tuple[bool, str]:
    """Return whether the kernel can compute such a layer on this machine, and the reason."""
    if spec.bits == UNQUANTIZED_BITS:
        return False, "the table-lookup kernel needs quantized activations (2 to 8 bits)"
    return available()


def packed_bytes(spec: LayerSpec) -> int:
    """Return the bytes of a packed layer: everything that the kernel reads except x, with N padded to 64 rows."""
    return _layer(spec, None).size


def empty_huge(size: int) -> Tensor:
    """Allocate uninitialized uint8 [size], on huge pages if it is large: they save a tenth of the time at M = 1.

    An ordinary tensor that owns its memory. It starts on a 2 MB boundary, so its storage is up to 2 MB longer: address
    space, not memory, since those pages are never touched.
    """
    if size < HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)
    storage = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    start = -storage.data_ptr() % HUGE_PAGE
    aligned = storage[start : start + size]
    load().handle.bwla_advise_huge_pages(aligned.data_ptr(), size)
    return aligned


def pack(tensors: Mapping[str, Tensor], spec: LayerSpec, isa: Isa | None = None) -> Tensor:
    """Repack a layer, once, into the contiguous memory that the kernel reads (layout.h).

    Args:
        tensors: the stored tensors (see docs/format.md), contiguous, on the CPU; not modified. A bias is not packed.
        spec: their sizes.
        isa: variant that will read it; by default the loaded one.

    Returns: uint8 [packed_bytes(spec)].

    Raises:
        BackendError: a tensor does not fit.
    """
    specs = {name: want for name, want in tensor_specs(spec).items() if name != "bias"}
    for name, want in specs.items():
        expect(name, tensors[name], storage_dtype(want, tensors[name].dtype), want.shape)
    tensors = to_compute_dtype(tensors)
    pointers = [tensors[name].data_ptr() if name in specs else None for name in PACKED_TENSORS]
    layer = _layer(spec, isa)
    packed = empty_huge(layer.size)
    threads = torch.get_num_threads()
    _check(load().handle.bwla_pack(layer.address, *pointers, packed.data_ptr(), threads), spec)
    return packed


def unpack_rows(packed: Tensor, spec: LayerSpec, rows: slice, isa: Isa | None = None) -> Tensor:
    """Dequantize rows of a packed layer in the rotated basis, without the low-rank part.

    Args:
        packed: from `pack` with the same spec and variant.
        spec: the layer.
        rows: the rows, from a multiple of 64 to another one or to the end.
        isa: variant; by default the loaded one.

    Returns: sum_p alpha_p S_p, float32 [rows, K]; in a grouped layer, alpha_p depends on the column.

    Raises:
        BackendError: the packed layer is of another spec.
    """
    layer = _layer(spec, isa)
    expect("packed", packed, torch.uint8, (layer.size,))
    weight = torch.empty((rows.stop - rows.start, spec.in_features))
    first, panels = rows.start // PANEL_ROWS, -(-weight.shape[0] // PANEL_ROWS)
    status = load().handle.bwla_unpack(
        layer.address, packed.data_ptr(), first, panels, weight.data_ptr(), torch.get_num_threads()
    )
    _check(status, spec)
    return weight


def _rows(x: Tensor, packed: Tensor, layer: _Layer, spec: LayerSpec) -> tuple[Tensor, int, int, int]:
    """Check x and `packed`; return x with unit stride along K, its number of rows, their stride, and its dtype."""
    dtype, k = DTYPES.get(x.dtype), spec.in_features
    if dtype is None or x.shape[-1] != k or not x.is_cpu:
        raise BackendError(
            f"x: expected bfloat16, float16 or float32 [..., {k}] on the CPU, "
            f"found {x.dtype} {list(x.shape)} on {x.device}"
        )
    if packed.nbytes != layer.size or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise BackendError(
            f"packed: expected contiguous uint8 [{layer.size}] for {spec}, "
            f"found {packed.dtype} {list(packed.shape)}: pack the layer with this spec"
        )
    if x.is_contiguous():
        return x, x.numel() // k, k, dtype
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.shape[0], rows.stride(0), dtype


def linear(
    x: Tensor,
    packed: Tensor,
    spec: LayerSpec,
    bias: Tensor | None = None,
    isa: Isa | None = None,
    threads: int | None = None,
) -> Tensor:
    """Compute the layer in one parallel region.

    Args:
        x: [..., K] bfloat16, float16 or float32; rows may be strided.
        packed: from `pack` with the same spec and variant.
        spec: the layer; `spec.bias` is ignored.
        bias: [N] bfloat16, float16 or float32, or None.
        isa: variant; by default the loaded one.
        threads: maximum number of threads, by default torch's; negative: exactly that number, however small the work.

    Returns: [..., N] in the dtype of x. A row's result is bitwise independent of the number of threads and of the
        other rows.

    Raises:
        BackendError: a tensor does not fit.
    """
    layer = _layer(spec, isa)
    rows, m, stride, dtype = _rows(x, packed, layer, spec)
    if bias is not None and (bias.shape != (spec.out_features,) or not bias.is_contiguous()):
        expect("bias", bias, bias.dtype, (spec.out_features,))
    out = x.new_empty(*x.shape[:-1], spec.out_features)
    threads = torch.get_num_threads() if threads is None else threads
    status = load().handle.bwla_linear(
        layer.address, packed.data_ptr(), rows.data_ptr(), m, stride, dtype,
        None if bias is None else bias.data_ptr(), 0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(), threads,
    )  # fmt: skip
    if status:
        _check(status, spec)
    return out


def prepare_input(
    x: Tensor, packed: Tensor, spec: LayerSpec, isa: Isa | None = None, threads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute only the input transform; arguments as in `linear`.

    Returns: codes int8 [M, K], scales float32 [M, G], u float32 [M, r], where M counts the rows of x.

    Raises:
        BackendError: a tensor does not fit.
    """
    layer = _layer(spec, isa)
    rows, m, stride, dtype = _rows(x, packed, layer, spec)
    q = torch.empty((m, spec.in_features), dtype=torch.int8)
    scale, u = torch.empty((m, spec.rotation_groups)), torch.empty((m, spec.rank))
    threads = torch.get_num_threads() if threads is None else threads
    status = load().handle.bwla_prepare_input(
        layer.address, packed.data_ptr(), rows.data_ptr(), m, stride, dtype,
        q.data_ptr(), scale.data_ptr(), u.data_ptr(), threads,
    )  # fmt: skip
    _check(status, spec)
    return q, scale, u


def binary_matmul(
    q: Tensor,
    scale: Tensor,
    u: Tensor,
    packed: Tensor,
    spec: LayerSpec,
    dtype: torch.dtype = torch.float32,
    isa: Isa | None = None,
    threads: int | None = None,
) -> Tensor:
    """Compute only the GEMM, without the bias.

    Args:
        q: int8 [M, K], within +-spec.q_max (not checked), scale: float32 [M, G], u: float32 [M, r],
            as from `prepare_input`.
        packed, spec, isa, threads: as in `linear`.
        dtype: of the result.

    Returns: [M, N] in `dtype`.

    Raises:
        BackendError: a tensor does not fit.
    """
    layer, m = _layer(spec, isa), q.shape[0]
    expect("q", q, torch.int8, (m, spec.in_features))
    expect("scale", scale, torch.float32, (m, spec.rotation_groups))
    expect("u", u, torch.float32, (m, spec.rank))
    expect("packed", packed, torch.uint8, (layer.size,))
    out = torch.empty((m, spec.out_features), dtype=dtype)
    threads = torch.get_num_threads() if threads is None else threads
    status = load().handle.bwla_binary_matmul(
        layer.address, packed.data_ptr(), q.data_ptr(), scale.data_ptr(), u.data_ptr(), m,
        out.data_ptr(), DTYPES[dtype], threads,
    )  # fmt: skip
    _check(status, spec)
    return out


def dot_products(
    q: Tensor, packed: Tensor, spec: LayerSpec, isa: Isa | None = None, threads: int | None = None
) -> Tensor:
    """Compute the exact integer sums of the GEMM, sum_{k in g} S[n, p, k] q[m, k]: int32 [M, G, P, N]; for tests.

    The axis of the planes is missing if there is a single one.

    Arguments as in `binary_matmul`.

    Raises:
        BackendError: a tensor does not fit.
    """
    layer, m = _layer(spec, isa), q.shape[0]
    expect("q", q, torch.int8, (m, spec.in_features))
    expect("packed", packed, torch.uint8, (layer.size,))
    planes = (spec.planes,) if spec.planes > 1 else ()
    sums = torch.empty((m, spec.rotation_groups, *planes, spec.out_features), dtype=torch.int32)
    threads = torch.get_num_threads() if threads is None else threads
    _check(
        load().handle.bwla_dot_products(
            layer.address, packed.data_ptr(), q.data_ptr(), m, sums.data_ptr(), threads
        ),
        spec,
    )
    return sums
