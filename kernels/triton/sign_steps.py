"""The steps of the sign search on NVIDIA GPUs; `sign_search.steps` has the reference implementations.

Triton is imported at the first launch, so that a machine without a GPU need not have it.
"""

import functools

import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.triton import gpu
from torch import Tensor

MOST_COLUMNS = 128
"""Columns of a block, at most: a program's time grows with their square."""

COLUMN_STEP = 32
"""Blocks of other widths are copied: the format has none, as the columns of a weight are a multiple of this."""

MOST_ELEMENTS = 1 << 31
"""Bound on the elements of a block, whose offsets are 32-bit integers."""


def can_run(device: torch.device, columns: int) -> tuple[bool, str]:
    """Return whether the kernels run on `device` for a block of `columns`, and the reason."""
    if columns > MOST_COLUMNS:
        return False, f"the Triton kernels take blocks of at most {MOST_COLUMNS} columns, found {columns}"
    return gpu.can_run(device)


def choose_signs(
    target: Tensor,
    product: Tensor,
    factor: Tensor,
    pivots: Tensor,
    scale: Tensor,
    sign: Tensor,
    dots: Tensor,
    norms: Tensor,
) -> None:
    """Choose the signs of a block by error feedback, in one launch; see `choose_signs_reference`.

    All tensors are float32 and contiguous, `product` is not changed. Where both signs are equally good up to rounding,
    the reference implementation may choose the other one.

    Raises:
        BackendError: a tensor does not fit, or the kernel computes wrong numbers with this GPU and Triton.
    """
    _check_tensors(
        target, scale, {"product": product, "sign": sign}, {"factor": factor}, {"dots": dots, "norms": norms}
    )
    _expect("pivots", pivots, (len(target),), target.device)
    if sign.numel():
        _checked(target.device)
        signs = _pad(sign)
        launch_choose_signs(
            _pad(target), _pad(product), _pad(factor, 2), _pad(pivots), scale, signs, dots, norms
        )
        _copy_back(signs, sign)


def flip_signs(
    target: Tensor,
    product: Tensor,
    hessian: Tensor,
    scale: Tensor,
    sign: Tensor,
    change: Tensor,
    dots: Tensor,
    norms: Tensor,
) -> None:
    """Visit every sign of a block once and flip it if that lowers the error, in one launch; see `flip_signs_reference`.

    All tensors are float32 and contiguous. A sign whose flip changes the error by no more than rounding may differ from
    the reference implementation's.

    Raises:
        BackendError: as in `choose_signs`.
    """
    blocks = {"product": product, "sign": sign, "change": change}
    _check_tensors(target, scale, blocks, {"hessian": hessian}, {"dots": dots, "norms": norms})
    if sign.numel():
        _checked(target.device)
        products, signs, changes = _pad(product), _pad(sign), _pad(change)
        launch_flip_signs(_pad(target), products, _pad(hessian, 2), scale, signs, changes, dots, norms)
        for padded, tensor in ((products, product), (signs, sign), (changes, change)):
            _copy_back(padded, tensor)


def launch_choose_signs(
    target: Tensor,
    product: Tensor,
    factor: Tensor,
    pivots: Tensor,
    scale: Tensor,
    sign: Tensor,
    dots: Tensor,
    norms: Tensor,
) -> None:
    """Launch the kernel of `choose_signs` without checks; the columns are a multiple of COLUMN_STEP."""
    from bwla_kernels.triton.binary_matmul import interpreted
    from bwla_kernels.triton.sign_steps_kernel import ROWS, choose_signs_kernel

    columns, candidates, rows = sign.shape
    choose_signs_kernel[(-(-rows // ROWS), candidates)](
        target, product, factor, pivots, scale, sign, dots, norms, rows, candidates, columns,
        PURE=interpreted(), **OPTIONS,
    )  # fmt: skip


def launch_flip_signs(
    target: Tensor,
    product: Tensor,
    hessian: Tensor,
    scale: Tensor,
    sign: Tensor,
    change: Tensor,
    dots: Tensor,
    norms: Tensor,
) -> None:
    """Launch the kernel of `flip_signs` without checks; the columns are a multiple of COLUMN_STEP."""
    from bwla_kernels.triton.binary_matmul import interpreted
    from bwla_kernels.triton.sign_steps_kernel import ROWS, flip_signs_kernel

    columns, candidates, rows = sign.shape
    flip_signs_kernel[(-(-rows // ROWS), candidates)](
        target, product, hessian, scale, sign, change, dots, norms, rows, candidates, columns,
        PURE=interpreted(), **OPTIONS,
    )  # fmt: skip


OPTIONS = {"num_warps": 1, "num_stages": 1}
"""Of the compiler. More warps would hold copies of a step's columns; loads in stages take registers, of which none are
left."""


def _pad(tensor: Tensor, dims: int = 1) -> Tensor:
    """Return a tensor of a block with zeros in columns up to a multiple of COLUMN_STEP; itself where none are missing.

    They change nothing: a zero in the matrix changes no product, and a sign that is zero does not flip.

    Args:
        tensor: its first `dims` dimensions are the columns of the block.
    """
    columns = len(tensor)
    extra = -columns % COLUMN_STEP
    if not extra:
        return tensor
    padded = tensor.new_zeros(*[columns + extra] * dims, *tensor.shape[dims:])
    padded[(slice(columns),) * dims] = tensor
    return padded


def _copy_back(padded: Tensor, tensor: Tensor) -> None:
    if padded is not tensor:
        tensor.copy_(padded[: len(tensor)])


def _check_tensors(
    target: Tensor,
    scale: Tensor,
    blocks: dict[str, Tensor],
    matrices: dict[str, Tensor],
    sums: dict[str, Tensor],
) -> None:
    """Raise BackendError unless shapes, dtypes, layouts and devices are those of a block of `target`'s columns."""
    if target.dim() != 2 or scale.dim() != 2:
        raise BackendError(
            f"target and scale: expected [B, N] and [C, N], found {list(target.shape)} and {list(scale.shape)}"
        )
    (columns, rows), candidates, device = target.shape, len(scale), target.device
    if columns > MOST_COLUMNS:
        raise BackendError(f"target: expected at most {MOST_COLUMNS} columns, found {list(target.shape)}")
    if columns * candidates * rows >= MOST_ELEMENTS:
        raise BackendError(
            f"sign: expected fewer than {MOST_ELEMENTS} elements, found {[columns, candidates, rows]}: "
            "search fewer rows at a time"
        )
    _expect("target", target, (columns, rows), device)
    for tensors, shape in (
        (blocks, (columns, candidates, rows)),
        (matrices, (columns, columns)),
        ({"scale": scale, **sums}, (candidates, rows)),
    ):
        for name, tensor in tensors.items():
            _expect(name, tensor, shape, device)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if (
        tensor.dtype != torch.float32
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or tensor.device != device
    ):
        raise BackendError(
            f"{name}: expected contiguous float32 {list(shape)} on {device}, found {tensor.dtype} "
            f"{list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
        )


CHECK_SHAPE = (128, 2, 20)
"""Columns, candidates and rows of `self_check`: the size of nearly all blocks, and rows that do not fill a
program. Other numbers of rows and candidates run the same compiled kernel."""

CHECK_SEED = 19


def draw_block(columns: int, candidates: int, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw arguments of `choose_signs` and `flip_signs`, on the CPU.

    Every number of the decisions is a multiple of 2^-16 or a power of two, so that float32 holds all sums exactly.
    Elements of the matrices have 16 bits and a sign: not all of them are sums of two bfloat16 numbers.
    """
    generator = torch.Generator("cpu").manual_seed(CHECK_SEED)

    def draw(bound: int, *shape: int) -> Tensor:
        integers = torch.randint(-(bound << 16), (bound << 16) + 1, shape, generator=generator, device="cpu")
        return integers.to(torch.float32) / 2**16

    shape = (columns, candidates, rows)
    matrix = draw(1, columns, columns)
    scale = torch.exp2(torch.randint(-2, 1, shape[1:], generator=generator, device="cpu").to(torch.float32))
    sums = {"dots": draw(1, *shape[1:]), "norms": draw(1, *shape[1:])}
    sign = torch.where(draw(1, *shape) >= 0, 1.0, -1.0)
    choose = {
        "target": draw(2, columns, rows),
        "product": draw(2, *shape),
        "factor": matrix.triu(1).fill_diagonal_(1.0),
        "pivots": draw(1, columns).abs() + 0.5,
        "scale": scale,
        "sign": torch.full_like(sign, float("nan")),
        **{name: tensor.clone() for name, tensor in sums.items()},
    }
    flip = {
        "target": draw(8, columns, rows),
        "product": draw(8, *shape),
        "hessian": ((matrix + matrix.mT) / 2).fill_diagonal_(4.0),
        "scale": scale,
        "sign": sign,
        "change": torch.full_like(sign, float("nan")),
        **sums,
    }
    return choose, flip


def self_check(device: torch.device) -> None:
    """Choose and flip the signs of a small block and compare with the reference implementation.

    Raises:
        BackendError: a kernel computes wrong numbers on this GPU with this Triton.
    """
    import triton
    from bwla_kernels.sign_search.steps import choose_signs_reference, flip_signs_reference

    choose, flip = draw_block(*CHECK_SHAPE)
    for launch, reference, tensors, exact in (
        (launch_choose_signs, choose_signs_reference, choose, ("sign",)),
        (launch_flip_signs, flip_signs_reference, flip, ("sign", "change", "product")),
    ):
        found = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        launch(**found)
        reference(**tensors)
        wrong = [name for name in exact if not torch.equal(found[name].cpu(), tensors[name])]
        for name in ("dots", "norms"):
            if not torch.allclose(found[name].cpu(), tensors[name], rtol=1e-4, atol=1e-2):
                wrong.append(name)
        if wrong:
            raise BackendError(
                f"the Triton kernel of {reference.__name__.removesuffix('_reference')} computes wrong "
                f"{' and '.join(wrong)} on {device} with Triton {triton.__version__}: use another release of Triton "
                "and report this"
            )


@functools.cache
def _checked(device: torch.device) -> None:
    self_check(device)
