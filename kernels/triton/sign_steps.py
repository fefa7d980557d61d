"""The steps of the sign search on NVIDIA GPUs; `sign_search.steps` has the reference implementations.

Triton is imported at the first launch, so that a machine without a GPU need not have it.
"""

import functools
from collections.abc import Mapping

import torch
from bwla_kernels.checks import MATRICES, SUMS, expect_sign_step
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
    tensors = {
        "target": target,
        "product": product,
        "factor": factor,
        "pivots": pivots,
        "scale": scale,
        "sign": sign,
    }
    _run("choose_signs", {**tensors, "dots": dots, "norms": norms}, changed=("sign",))


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
    tensors = {
        "target": target,
        "product": product,
        "hessian": hessian,
        "scale": scale,
        "sign": sign,
        "change": change,
    }
    _run("flip_signs", {**tensors, "dots": dots, "norms": norms}, changed=("product", "sign", "change"))


def _run(step: str, tensors: dict[str, Tensor], changed: tuple[str, ...]) -> None:
    """Check the arguments of a step, launch its kernel, and return what it wrote to padded copies."""
    target, sign = tensors["target"], tensors["sign"]
    if len(target) > MOST_COLUMNS:
        raise BackendError(f"target: expected at most {MOST_COLUMNS} columns, found {list(target.shape)}")
    if sign.numel() >= MOST_ELEMENTS:
        raise BackendError(
            f"sign: expected fewer than {MOST_ELEMENTS} elements, found {list(sign.shape)}: "
            "search fewer rows at a time"
        )
    expect_sign_step(tensors, target.device)
    if not sign.numel():
        return
    _checked(target.device)
    padded = {
        name: tensor if name in SUMS else _pad(tensor, name in MATRICES) for name, tensor in tensors.items()
    }
    launch(step, padded)
    for name in changed:
        if padded[name] is not tensors[name]:
            tensors[name].copy_(padded[name][: len(target)])


def launch(step: str, tensors: Mapping[str, Tensor]) -> None:
    """Launch the kernel of a step without checks.

    Args:
        step: "choose_signs" or "flip_signs".
        tensors: the step's arguments by name; the columns are a multiple of COLUMN_STEP.
    """
    from bwla_kernels.triton import sign_steps_kernel
    from bwla_kernels.triton.binary_matmul import interpreted

    columns, candidates, rows = tensors["sign"].shape
    kernel = getattr(sign_steps_kernel, f"{step}_kernel")
    kernel[(-(-rows // sign_steps_kernel.ROWS), candidates)](
        **tensors, N=rows, C=candidates, B=columns, PURE=interpreted(), **OPTIONS
    )


OPTIONS = {"num_warps": 1, "num_stages": 1}
"""Of the compiler. More warps would hold copies of a step's columns; loads in stages take registers, of which none are
left."""


def _pad(tensor: Tensor, matrix: bool) -> Tensor:
    """Return a tensor of a block with zeros in columns up to a multiple of COLUMN_STEP; itself where none are missing.

    They change nothing: a zero in the matrix changes no product, and a sign that is zero does not flip.

    Args:
        tensor: its first dimension is the columns of the block.
        matrix: whether the second one is, too.
    """
    columns, dims = len(tensor), 1 + matrix
    extra = -columns % COLUMN_STEP
    if not extra:
        return tensor
    padded = tensor.new_zeros(*[columns + extra] * dims, *tensor.shape[dims:])
    padded[(slice(columns),) * dims] = tensor
    return padded


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
    for step, reference, tensors, exact in (
        ("choose_signs", choose_signs_reference, choose, ("sign",)),
        ("flip_signs", flip_signs_reference, flip, ("sign", "change", "product")),
    ):
        found = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        launch(step, found)
        reference(**tensors)
        wrong = [name for name in exact if not torch.equal(found[name].cpu(), tensors[name])]
        for name in ("dots", "norms"):
            if not torch.allclose(found[name].cpu(), tensors[name], rtol=1e-4, atol=1e-2):
                wrong.append(name)
        if wrong:
            raise BackendError(
                f"the Triton kernel of {step} computes wrong "
                f"{' and '.join(wrong)} on {device} with Triton {triton.__version__}: use another release of Triton "
                "and report this"
            )


@functools.cache
def _checked(device: torch.device) -> None:
    self_check(device)
