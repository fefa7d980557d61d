"""Compare every kernel that will serve with plain torch on a small problem, before the first request.

A new release of Triton or a new GPU may choose tensor layouts or assemble code differently than the tested ones, and a
model that computes wrong results should not be served. Each check launches what the layer will launch (same rotation
groups, bits, rank and dtypes), so it compiles nothing additional, and runs once per process and device.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from bwla_kernels import reference
from bwla_kernels.errors import BackendError
from bwla_kernels.factorize import PACK_FACTOR, RANK_STEP
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import ROTATION_DTYPE
from bwla_kernels.triton.binary_matmul import MAX_SPLIT_TILES, Weights, binary_matmul
from bwla_kernels.triton.layout import chunk_layout, pack_planes, repack_weights, unpack_weights
from bwla_kernels.triton.prepare_config import FewConfig, InputConfig
from bwla_kernels.triton.prepare_input import FusedInput, QuantizedInput, prepare_input, split_rotations
from bwla_kernels.triton.tuning import INTEGER, MatmulConfig
from torch import Tensor

PLAIN, NORM, ADD_NORM, SILU_MUL = "", "norm", "add+norm", "silu*mul"
"""Names of what is fused into the load of a layer's input."""

MOST_TOKENS = 65
"""Most tokens of a check of the input kernel: several of its widest tiles (16 tokens), and one that is not full."""

ROWS = 256
"""Padded rows of a check's weight; the last of them do not exist."""

CPU = torch.device("cpu")

ADVICE = "serve with BWLA_BACKEND=torch, or with another release of Triton, and report this"

X_HAT_ERROR = 2.0**-16
"""Bound on the error of x_hat in units of the 2-norm of the token's rotation group (see `prepare_input`)."""

U_ERROR = 2.0**-16
"""Bound on the error of u in units of |x| |A|^T; float32 sums of 28,672 columns stay far below."""

EPS = 4.0
"""Of the norms: with inputs of mean square 12 the root is 4, and nothing of the norm rounds."""

MEAN_SQUARE_12 = (0, 1, 1, 2, 3, 4, 4, 7)
"""Magnitudes whose mean square is 12."""


class Draw:
    """Random tensors on the CPU, whatever torch's default device and dtype are while a model is loaded."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw int64 in [low, high]."""
        return torch.randint(low, high + 1, shape, generator=self.generator, device="cpu")

    def powers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw float32 powers of two, 2^low to 2^high."""
        return torch.exp2(self.integers(low, high, *shape).float())

    def uniform(self, *shape: int) -> Tensor:
        """Draw float32 in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device="cpu", dtype=torch.float32)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw from the normal distribution with mean 0 and variance 1."""
        return torch.randn(shape, generator=self.generator, device="cpu", dtype=dtype)


@functools.cache
def check_matmul(
    spec: LayerSpec,
    config: MatmulConfig,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    device: torch.device,
    dependent_launch: bool = False,
) -> None:
    """Multiply with one configuration; every number is chosen so that float32 holds all sums exactly.

    Args:
        spec: the layer, reduced to few rows; see `matmul_spec`.
        config: how to multiply.
        dtype: of the output.
        bias_dtype: of the bias; None for none.
        device: where to run.
        dependent_launch: as the layer will be launched.

    Raises:
        BackendError: the result differs in a bit, or the kernel cannot be compiled.
    """
    name = f"{config.kernel}_mma ({config})"
    draw = Draw(0)
    # As in the layer: a multiple of 16 where the layer's is one (Triton compiles another kernel for others).
    rows = max(ROWS, config.block_n) - (48 if spec.out_features % 16 == 0 else 55)
    layout = chunk_layout(rows, spec.rotation_groups, spec.group_width, spec.planes)
    m = config.block_m + (3 if config.kernel == INTEGER else 0)

    row = (rows,) if spec.planes == 1 else (rows, spec.planes)
    words = draw.integers(-(2**31), 2**31 - 1, *row, spec.in_features // PACK_FACTOR).int()
    packed = repack_weights(words, layout)
    q = draw.integers(-spec.q_max, spec.q_max, m, spec.in_features).to(torch.int8)
    q_sum = q.unflatten(1, (spec.rotation_groups, spec.group_width)).sum(-1, dtype=torch.int32)
    scale, alpha = draw.powers(-1, 1, m, spec.rotation_groups), draw.powers(-8, -7, *row)
    expected = torch.zeros(m, rows, dtype=torch.float64, device="cpu")
    for p, signs in enumerate(unpack_weights(packed, layout).unbind(1)):
        sums = reference.group_sums(q, signs, spec.rotation_groups)
        products = (sums.double() * scale.double().unsqueeze(-1)).sum(1)
        expected += products * alpha.view(rows, -1)[:, p].double()
    u = low_b = bias = None
    if spec.rank:
        # u has more bits than bfloat16 holds.
        u = draw.integers(-(2**15), 2**15, m, spec.rank).float() / 2**13
        low_b = draw.integers(-2, 2, rows, spec.rank).bfloat16()
        expected += u.double() @ low_b.double().t()
        low_b = torch.nn.functional.pad(low_b, (0, -spec.rank % RANK_STEP, 0, layout.rows - rows))
    if bias_dtype is not None:
        bias = draw.integers(-8, 8, rows).to(bias_dtype)
        expected += bias.double()
    counters = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
    prepared = QuantizedInput(
        q.to(device),
        scale.to(device),
        q_sum.to(device),
        _to(u, device),
        pack_planes(q, spec.bits, layout).to(device),
    )
    weights = Weights(
        packed.to(device), alpha.to(device), _to(low_b, device), _to(bias, device), counters, layout
    )
    with _compiled(name, device):
        y = binary_matmul(prepared, weights, spec.bits, config, dtype, dependent_launch).cpu()
    if not torch.equal(y, expected.to(dtype)):
        worst = (y.double() - expected).abs().max().item()
        _fail(name, f"products (largest error {worst:g})", device)
    if counters.any():
        _fail(name, "counters, which the next call relies on,", device)


def matmul_spec(spec: LayerSpec) -> LayerSpec:
    """Reduce a spec to what `check_matmul` depends on, so that layers that agree in it share a check."""
    rows = ROWS if spec.out_features % 16 == 0 else ROWS - 1
    sizes = (spec.in_features, spec.rotation_groups, spec.n1, spec.n2, spec.rank, spec.bits)
    return LayerSpec(rows, *sizes, planes=spec.planes)


def input_spec(spec: LayerSpec) -> LayerSpec:
    """Reduce a spec to what `check_input` depends on."""
    return LayerSpec(
        ROWS, spec.in_features, spec.rotation_groups, spec.n1, spec.n2, spec.rank, spec.bits, clip=spec.clip
    )


@functools.cache
def check_input(
    spec: LayerSpec,
    config: InputConfig | FewConfig,
    tokens: int,
    planes: bool,
    dtype: torch.dtype,
    fused: str,
    norm_dtype: torch.dtype | None,
    device: torch.device,
    dependent_launch: bool = False,
) -> None:
    """Prepare inputs with one configuration, as precisely as the head of `prepare_input` promises.

    Args:
        spec: the layer, see `input_spec`.
        config: tiles.
        tokens: for which `config` was chosen; at most 65 are computed.
        planes: whether bit planes are written.
        dtype: of the input.
        fused: what is fused into its load: "", "norm", "add+norm" or "silu*mul".
        norm_dtype: of the norm's weight; None without a norm.
        device: where to run.
        dependent_launch: as the layer will be launched.

    Raises:
        BackendError: an output is wrong, or the kernel cannot be compiled.
    """
    name = f"prepare_input{f' with {fused}' if fused else ''} ({config})"
    draw = Draw(1)
    tensors = _draw_transform(spec, draw)
    left, right = split_rotations(tensors["rotation_left"], tensors["rotation_right"])
    counters = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
    transform = {**tensors, "left_split": left, "right_split": right, "split_counters": counters}
    drawn = draw_input(fused, min(tokens, MOST_TOKENS), spec.in_features, dtype, norm_dtype, draw)
    layout = chunk_layout(spec.out_features, spec.rotation_groups, spec.group_width)
    with _compiled(name, device):
        prepared = prepare_input(
            drawn.x.to(device),
            {key: tensor.to(device) for key, tensor in transform.items()},
            spec,
            planes=planes,
            chunk=layout.chunk,
            fused=FusedInput(
                _to(drawn.norm_weight, device), EPS, _to(drawn.residual, device), fused == SILU_MUL
            ),
            config=config,
            dependent_launch=dependent_launch,
        )
        found = QuantizedInput(
            prepared.q.cpu(),
            prepared.scale.cpu(),
            prepared.q_sum.cpu(),
            *(_to(part, CPU) for part in (prepared.u, prepared.planes, prepared.residual)),
        )
    problem = input_problem(found, drawn, tensors, spec)
    if problem is None and counters.any():
        problem = "counters, which the next call relies on,"
    if problem is not None:
        _fail(name, problem, device)


@dataclass(frozen=True)
class DrawnInput:
    """An input whose fused form rounds nothing that another order of operations would round differently.

    Attributes:
        x: what the kernel loads.
        plain: float64 [M, K], what the layer reads once the norm or SiLU * mul is done.
        norm_weight: [K], where there is a norm.
        residual: [M, K], where one is added.
        total: x + residual in the dtype of x, likewise.
    """

    x: Tensor
    plain: Tensor
    norm_weight: Tensor | None = None
    residual: Tensor | None = None
    total: Tensor | None = None


def draw_input(
    fused: str,
    m: int,
    k: int,
    dtype: torch.dtype,
    norm_dtype: torch.dtype | None,
    draw: Draw,
) -> DrawnInput:
    """Draw M tokens of K columns (K a multiple of 8) for one kind of fused load."""
    if fused in (NORM, ADD_NORM):
        magnitudes = torch.tensor(MEAN_SQUARE_12, device="cpu").repeat(k // len(MEAN_SQUARE_12))
        total = magnitudes[draw.uniform(m, k).argsort(1)] * (2 * draw.integers(0, 1, m, k) - 1)
        weight = draw.integers(2, 6, k).float() / 4
        plain = total.double() / 4 * weight.double()
        weight = weight.to(norm_dtype)
        if fused == NORM:
            return DrawnInput(total.to(dtype), plain, weight)
        residual = draw.integers(-4, 4, m, k)
        return DrawnInput((total - residual).to(dtype), plain, weight, residual.to(dtype), total.to(dtype))
    x = draw.normal(m, k)
    if fused == SILU_MUL:
        gate = (3 * x).clamp(-8, 8).to(dtype)
        exact = gate.double() / (1 + torch.exp(-gate.double()))
        # Where exp's last bits decide how silu(gate) rounds, take 0.
        clear = (exact * (1 + 2.0**-16)).to(dtype) == (exact * (1 - 2.0**-16)).to(dtype)
        if dtype != torch.float32:
            gate, exact = torch.where(clear, gate, 0), torch.where(clear, exact, 0)
        up = draw.normal(m, k).to(dtype)
        plain = (exact.to(dtype).float() * up.float()).to(dtype).double()
        return DrawnInput(torch.cat((gate, up), 1), plain)
    # Tokens of different magnitudes, some columns far out.
    x *= draw.powers(-4, 4, m, 1)
    x[:, :: max(1, k // 5)] *= 20
    return DrawnInput(x.to(dtype), x.to(dtype).double())


def input_problem(
    found: QuantizedInput, drawn: DrawnInput, tensors: Mapping[str, Tensor], spec: LayerSpec
) -> str | None:
    """Return which output of the input kernel is wrong, or None; all tensors are on the CPU."""
    x, groups = drawn.plain, spec.rotation_groups
    expected = reference.prepare_input(x, tensors, spec)
    rotated = reference.rotate(x, tensors["rotation_left"], tensors["rotation_right"])
    x_hat = (rotated * tensors["column_scale"]).unflatten(1, (groups, -1))
    norm = x.unflatten(1, (groups, -1)).norm(dim=-1)
    error = X_HAT_ERROR * norm * tensors["column_scale"].max()
    step = expected.scale.double()
    # `not (a <= b)` catches NaN, too.
    if not ((found.scale - step).abs() <= error * spec.clip / spec.q_max + 1e-6 * step).all():
        return "scales"
    q = found.q.unflatten(1, (groups, -1))
    ideal = (x_hat / step.unsqueeze(-1)).clamp(-spec.q_max, spec.q_max)
    if (found.q.int() - expected.q.int()).abs().max() > 1:
        return "codes"
    if not ((q - ideal).abs() <= 0.5 + (3 * error / step).unsqueeze(-1)).all():
        return "codes (not only at rounding ties)"
    if not torch.equal(found.q_sum, q.sum(-1, dtype=torch.int32)):
        return "sums of codes"
    layout = chunk_layout(spec.out_features, groups, spec.group_width)
    if found.planes is not None and not torch.equal(found.planes, pack_planes(found.q, spec.bits, layout)):
        return "bit planes"
    if found.u is not None:
        a = tensors["low_rank_a"].double()
        if not ((found.u - x @ a.t()).abs() <= U_ERROR * (x.abs() @ a.abs().t())).all():
            return "low-rank inputs u"
    if drawn.total is not None and not (
        found.residual is not None and torch.equal(found.residual, drawn.total)
    ):
        return "sums with the residual"
    return None


def _draw_transform(spec: LayerSpec, draw: Draw) -> dict[str, Tensor]:
    """Draw random rotations, column scales and A."""

    def rotation(order: int) -> Tensor:
        square = draw.normal(spec.rotation_groups, order, order, dtype=torch.float64)
        orthogonal: Tensor = torch.linalg.qr(square).Q
        return orthogonal.to(ROTATION_DTYPE)

    tensors = {
        "rotation_left": rotation(spec.n1),
        "rotation_right": rotation(spec.n2),
        "column_scale": draw.uniform(spec.in_features) + 0.5,
    }
    if spec.rank:
        tensors["low_rank_a"] = draw.normal(spec.rank, spec.in_features).bfloat16()
    return tensors


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


@contextmanager
def _compiled(kernel: str, device: torch.device) -> Iterator[None]:
    """Convert Triton's errors to a BackendError of one sentence."""
    try:
        yield
    except triton.TritonError as error:
        raise BackendError(
            f"the Triton kernel {kernel} cannot run on {_gpu(device)} with Triton {triton.__version__} "
            f"({' '.join(str(error).split())[:300]}): {ADVICE}"
        ) from error


def _fail(kernel: str, what: str, device: torch.device) -> None:
    raise BackendError(
        f"the Triton kernel {kernel} computes wrong {what} on {_gpu(device)} with Triton {triton.__version__}: "
        f"{ADVICE}"
    )


def _gpu(device: torch.device) -> str:
    """Return a GPU's name and compute capability, or the device's name for the interpreter."""
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
