"""The matmul kernels against the reference implementation: in the interpreter here, for real where there is a GPU."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec, pack_signs
from bwla_kernels.triton.binary_matmul import (
    Weights,
    binary_matmul,
    prepare_weights,
    weights_from_tensors,
)
from bwla_kernels.triton.epilogue import RANK_STEP
from bwla_kernels.triton.layout import chunk_layout, pack_planes, repack_weights
from bwla_kernels.triton.prepare_input import QuantizedInput
from bwla_kernels.triton.tuning import BINARY, INTEGER, MatmulConfig, select_config
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Sizes of y [M, N] and what it is made of; `plain` makes y the integer sums themselves."""

    m: int
    n: int
    blocks: int
    group_width: int
    bits: int = 6
    rank: int = 0
    bias: bool = False
    plain: bool = False
    planes: int = 1


@dataclass(frozen=True)
class Drawn:
    """A drawn problem, its exact result (float64 [M, N]) and the magnitude of what was added up for it."""

    prepared: QuantizedInput
    weights: Weights
    want: Tensor
    size: Tensor


def draw(problem: Problem, device: torch.device, seed: int = 0) -> Drawn:
    """Random codes over the whole range of `bits`, signs, scales, low-rank factors and bias."""
    generator = torch.Generator().manual_seed(seed)
    p = problem
    k, q_max = p.blocks * p.group_width, (1 << (p.bits - 1)) - 1
    q = torch.randint(-q_max, q_max + 1, (p.m, k), generator=generator, dtype=torch.int8)
    row = (p.n,) if p.planes == 1 else (p.n, p.planes)  # a single plane has no axis
    signs = torch.randint(0, 2, (*row, k), generator=generator, dtype=torch.int8) * 2 - 1
    scale = torch.ones(p.m, p.blocks) if p.plain else torch.rand(p.m, p.blocks, generator=generator) + 0.1
    alpha = torch.rand(row, generator=generator) / k**0.5 + 0.01
    if p.plain:  # whole numbers by which the planes can be distinguished
        alpha = torch.tensor([1.0, 2.0, 5.0, 11.0])[: p.planes].expand(p.n, -1).contiguous().view(row)
    q_sum = q.unflatten(1, (p.blocks, p.group_width)).sum(-1, dtype=torch.int32)
    u = torch.randn(p.m, p.rank, generator=generator) if p.rank else None
    low_b = torch.randn(p.n, p.rank, generator=generator).bfloat16() if p.rank else None
    bias = torch.randn(p.n, generator=generator) if p.bias else None

    want = torch.zeros(p.m, p.n, dtype=torch.float64)
    for plane in range(p.planes):
        sums = reference.group_sums(q, signs.view(p.n, -1, k)[:, plane], p.blocks).double()
        want += (sums * scale.double().unsqueeze(-1)).sum(1) * alpha.view(p.n, -1)[:, plane].double()
    scaled = q.abs().double() * scale.double().repeat_interleave(p.group_width, 1)
    size = 2 * scaled.sum(1, keepdim=True) * alpha.view(p.n, -1).sum(1).double()
    if u is not None and low_b is not None:
        want += u.double() @ low_b.double().t()
        size = size + u.abs().double() @ low_b.abs().double().t()
    if bias is not None:
        want += bias.double()
        size = size + bias.abs().double()

    layout = chunk_layout(p.n, p.blocks, p.group_width, p.planes)
    padded = None
    if low_b is not None:
        padded = torch.zeros(layout.rows, -(-p.rank // RANK_STEP) * RANK_STEP, dtype=torch.bfloat16)
        padded[: p.n, : p.rank] = low_b
    planes = pack_planes(q, p.bits, layout)
    weights = Weights(
        repack_weights(pack_signs(signs), layout).to(device),
        alpha.to(device),
        None if padded is None else padded.to(device),
        None if bias is None else bias.to(device),
        torch.zeros(64, dtype=torch.int32, device=device),
        layout,
    )
    prepared = QuantizedInput(
        q.to(device),
        scale.to(device),
        q_sum.to(device),
        None if u is None else u.to(device),
        planes.to(device),
    )
    return Drawn(prepared, weights, want.to(device), size.to(device))


def check(
    problem: Problem, config: MatmulConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> None:
    """Run one configuration and compare: integers exactly, else to float32 sums and one rounding of the output."""
    drawn = draw(problem, device, seed)
    y = binary_matmul(drawn.prepared, drawn.weights, problem.bits, config, dtype)
    assert y.dtype == dtype
    assert y.shape == (problem.m, problem.n)
    counters = drawn.weights.counters
    assert counters is not None
    assert not counters.any()
    if problem.plain:
        assert dtype == torch.float32
        assert torch.equal(y.double(), drawn.want)
        return
    # Sums of float32 terms: a few units in the last place of all that was added; then one rounding.
    bound = drawn.size * 2.0**-22 + drawn.want.abs() * torch.finfo(dtype).eps / 2
    if dtype == torch.float16:
        bound = bound + 2.0**-24
    error = (y.double() - drawn.want).abs()
    assert (error <= bound).all(), (
        f"{problem} {config}: off by up to {(error / bound).max().item():.1f} bounds"
    )


def binary(tokens: int, rows: int = 32, warps: int = 2, k_warps: int = 2, unroll: int = 1) -> MatmulConfig:
    return MatmulConfig(BINARY, tokens, rows, warps, k_warps=k_warps, unroll=unroll)


def integer(tokens: int, rows: int = 64, split: int = 1, warps: int = 4) -> MatmulConfig:
    return MatmulConfig(INTEGER, tokens, rows, warps, 3, split=split)


BLOCKS = [
    pytest.param(1, 512, id="one-block"),
    pytest.param(1, 800, id="one-padded-block"),
    pytest.param(3, 256, id="blocks"),
    pytest.param(5, 384, id="chunks-of-128"),
    pytest.param(2, 96, id="padded-blocks"),
]


@pytest.mark.parametrize(("blocks", "width"), BLOCKS)
@pytest.mark.parametrize(
    ("m", "config"),
    [
        (1, binary(1)),
        (3, binary(4, k_warps=1)),
        (7, binary(8, unroll=2)),
        (5, integer(16)),
        (5, integer(16, split=2)),
        (33, integer(32)),
    ],
    ids=str,
)
def test_integers_are_exact(
    m: int, config: MatmulConfig, blocks: int, width: int, device: torch.device
) -> None:
    check(Problem(m, 40, blocks, width, plain=True), config, torch.float32, device)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("m", "config"), [(2, binary(2)), (2, integer(16))], ids=str)
def test_bits(bits: int, m: int, config: MatmulConfig, device: torch.device) -> None:
    check(Problem(m, 16, 1, 512, bits=bits, plain=True), config, torch.float32, device)
    check(Problem(m, 16, 2, 256, bits=bits), config, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("blocks", "width"), BLOCKS)
@pytest.mark.parametrize(
    ("m", "config"),
    [
        (4, binary(4)),
        (8, binary(8, unroll=2)),
        (1, binary(1, k_warps=1)),
        (17, integer(32)),
        (6, integer(16, split=4)),
    ],
    ids=str,
)
def test_outputs(
    m: int, config: MatmulConfig, blocks: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Scales, low-rank term and bias, with rows and tokens that fill no tile."""
    check(Problem(m, 70, blocks, width, rank=16, bias=True), config, dtype, device)


@pytest.mark.parametrize("config", [binary(2), integer(16)], ids=str)
def test_any_rank(config: MatmulConfig, device: torch.device) -> None:
    """Whatever multiple of 16 it is padded to."""
    for rank in range(65):
        check(Problem(2, 40, 1, 256, rank=rank), config, torch.float32, device)


@pytest.mark.parametrize("k_warps", [1, 2, 4])
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_warps_share_the_columns(k_warps: int, blocks: int, device: torch.device) -> None:
    """Warps take turns by steps or by blocks, and the turns need not come out even."""
    check(
        Problem(1, 33, blocks, 256, plain=True), binary(1, 64 // k_warps, 4, k_warps), torch.float32, device
    )
    check(Problem(1, 33, blocks, 256), binary(1, 64 // k_warps, 4, k_warps), torch.float32, device)


@pytest.mark.parametrize("unroll", [2, 3, 8])
@pytest.mark.parametrize(("blocks", "width"), [(1, 1024), (1, 2720), (2, 1024), (3, 1600), (4, 128)])
def test_steps_are_loaded_in_groups(unroll: int, blocks: int, width: int, device: torch.device) -> None:
    """Groups that end within a block, and groups longer than a block."""
    problem = Problem(1, 33, blocks, width)
    check(problem, binary(1, 32, 2, 1, unroll), torch.float32, device)
    check(problem, binary(1, 16, 2, 2, unroll), torch.float32, device)


@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize(("blocks", "width"), [(1, 256), (1, 1280), (3, 512), (8, 128)])
def test_shares_of_the_columns_add_up(split: int, blocks: int, width: int, device: torch.device) -> None:
    """Shares that cut blocks, and more shares than chunks."""
    problem = Problem(3, 20, blocks, width, plain=True)
    check(problem, integer(16, split=split), torch.float32, device)
    check(Problem(3, 20, blocks, width, rank=16, bias=True), integer(16, split=split), torch.float32, device)


def test_many_tiles_of_tokens_and_rows(device: torch.device) -> None:
    """More token tiles than a cache group holds, and a last group that is not full."""
    check(Problem(150, 300, 1, 64, plain=True), integer(16, rows=128), torch.float32, device)


@pytest.mark.parametrize("config", [binary(1), integer(16)], ids=str)
def test_no_tokens(config: MatmulConfig, device: torch.device) -> None:
    drawn = draw(Problem(0, 20, 1, 256), device)
    y = binary_matmul(drawn.prepared, drawn.weights, 6, config, torch.float16)
    assert y.shape == (0, 20)


@pytest.mark.parametrize("planes", [2, 3, 4])
@pytest.mark.parametrize(("blocks", "width"), BLOCKS)
@pytest.mark.parametrize(
    ("m", "config"),
    [
        (1, binary(1)),
        (3, binary(4, rows=64, warps=4, k_warps=1)),
        (7, binary(8, unroll=2)),
        (5, integer(16, rows=32)),
        (5, integer(16, rows=16, split=2)),
        (33, integer(32)),
    ],
    ids=str,
)
def test_integers_of_several_planes_are_exact(
    m: int, config: MatmulConfig, blocks: int, width: int, planes: int, device: torch.device
) -> None:
    check(Problem(m, 40, blocks, width, plain=True, planes=planes), config, torch.float32, device)


def random_problem(draws: random.Random) -> Problem:
    """Draw a small problem of one to four planes."""
    blocks = draws.choice([1, 1, 2, 3, 5])
    return Problem(
        draws.randint(1, 20),
        draws.randint(1, 70),
        blocks,
        32 * draws.randint(1, 24 // blocks),
        bits=draws.randint(2, 8),
        rank=draws.choice([0, 5, 16]),
        bias=draws.random() < 0.5,
        plain=draws.random() < 0.5,
        planes=draws.randint(1, 4),
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes_and_planes(seed: int, device: torch.device) -> None:
    """Ten random problems a seed, each in a random cut of the kernel that its number of tokens allows."""
    draws = random.Random(seed)
    for number in range(10):
        problem = random_problem(draws)
        if problem.plain:
            problem = replace(problem, rank=0, bias=False)
        unroll = draws.randint(1, 3)
        if problem.m <= 8 and draws.random() < 0.6:
            tokens = next(tokens for tokens in (1, 2, 4, 8) if tokens >= problem.m)
            config = binary(tokens, draws.choice([32, 64]), 4, draws.choice([2, 4]), unroll)
        else:
            config = integer(16, draws.choice([16, 32, 64]), draws.choice([1, 2, 4]))
        dtype = torch.float32 if problem.plain else draws.choice([torch.float16, torch.float32])
        check(problem, config, dtype, device, 100 * seed + number)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_a_stored_layer(make_layer, planes: int, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    """The stored weights, prepared as a backend would, against the reference."""
    spec = LayerSpec(72, 512, 2, 16, 16, rank=3, bias=True, planes=planes)
    tensors = make_layer(spec, 1)
    source = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
    prepared = reference.prepare_input(source, tensors, spec)
    want = reference.binary_matmul(prepared, tensors, spec)
    q_sum = prepared.q.unflatten(1, (2, 256)).sum(-1, dtype=torch.int32)
    stored = {name: tensor.to(device) for name, tensor in tensors.items()}
    weights = weights_from_tensors(prepare_weights(stored, spec), spec)
    u = prepared.u
    assert u is not None
    planes = pack_planes(prepared.q, spec.bits, weights.layout)
    x = QuantizedInput(*(part.to(device) for part in (prepared.q, prepared.scale, q_sum, u, planes)))
    for config in (binary(4), integer(16)):
        y = binary_matmul(x, weights, spec.bits, config, torch.float32)
        torch.testing.assert_close(y.cpu(), want, rtol=1e-5, atol=1e-4)


def test_refuses_what_a_configuration_cannot_do(device: torch.device) -> None:
    drawn = draw(Problem(3, 20, 1, 256), device)
    with pytest.raises(BackendError, match="at most 2 tokens, found 3 tokens"):
        binary_matmul(drawn.prepared, drawn.weights, 6, binary(2), torch.float16)
    with pytest.raises(BackendError, match="expected kernel binary or integer, found other"):
        binary_matmul(drawn.prepared, drawn.weights, 6, MatmulConfig("other", 1, 16, 1), torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_on_a_gpu(seed: int) -> None:
    """60 random problems a seed (1,200 in all), each in the configuration that serving would choose for it."""
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability()
    sm_count = torch.cuda.get_device_properties(device).multi_processor_count
    draws = random.Random(seed)
    for number in range(60):
        blocks = draws.choice([1, 1, 2, 3, 8])
        width = 32 * draws.randint(1, 64 if blocks > 1 else 160)
        m = draws.choice([1, 1, 2, 3, 4, draws.randint(5, 32), draws.randint(33, 600)])
        problem = Problem(
            m,
            draws.choice([draws.randint(1, 300), draws.randint(300, 5000)]),
            blocks,
            width,
            bits=draws.randint(2, 8),
            rank=draws.choice([0, 4, 16, 32]),
            bias=draws.random() < 0.5,
            plain=draws.random() < 0.3,
            planes=draws.randint(1, 4),
        )
        chunk = chunk_layout(problem.n, blocks, width).chunk
        config = select_config(
            *(problem.n, blocks * width, blocks, chunk, m, problem.bits),
            capability,
            sm_count,
            problem.planes,
        )
        dtype = (
            torch.float32 if problem.plain else draws.choice([torch.bfloat16, torch.float16, torch.float32])
        )
        check(problem, config, dtype, device, seed * 1000 + number)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", [BINARY, INTEGER])
def test_kernels_agree_on_a_gpu(kernel: str) -> None:
    """Both kernels on the same 400 random small problems: exact integers."""
    device = torch.device("cuda")
    if kernel == BINARY and torch.cuda.get_device_capability()[0] >= 10:
        pytest.skip("binary tensor cores are emulated here")
    draws = random.Random(1)
    for seed in range(400):
        blocks = draws.choice([1, 2, 5])
        problem = Problem(
            draws.randint(1, 4),
            draws.randint(1, 400),
            blocks,
            32 * draws.randint(1, 40),
            draws.randint(2, 8),
            plain=True,
            planes=draws.randint(1, 4),
        )
        config = binary(4, 64, 4, 4) if kernel == BINARY else integer(16, 128, draws.choice([1, 2, 8]))
        check(problem, config, torch.float32, device, seed)
