"""The head's GPU kernels equal the reference implementation bit for bit, in the interpreter or on a GPU."""

import random

import pytest
import torch
from bwla_kernels import head, ops
from bwla_kernels.errors import BackendError
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.triton import gpu as triton_gpu
from bwla_kernels.triton import head as triton_head
from bwla_kernels.triton.head import CONFIGS, HeadConfig, TritonHead, select_config
from torch import Tensor

# bfloat16 arithmetic is not the interpreter's strength: there it is tested on a GPU.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else []))


def draw(
    rows: int, columns: int, tokens: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x [tokens, columns], among it zeros and an outlier, and a head's codes and scales."""
    generator = torch.Generator().manual_seed(rows + columns + tokens)
    weight = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    weight_scale = torch.rand(rows, generator=generator) + 0.01
    x = torch.randn(tokens, columns, generator=generator)
    if tokens > 2:
        x[1] = 0
        x[2, 0] = 1000.0
    return x.to(device, dtype), weight.to(device), weight_scale.to(device)


def assert_equal(x: Tensor, weight: Tensor, weight_scale: Tensor, config: HeadConfig | None = None) -> None:
    y = triton_head.head(x, weight, weight_scale, config)
    want = head.head_reference(x.cpu(), weight.cpu(), weight_scale.cpu())
    assert y.dtype == want.dtype
    assert torch.equal(y.cpu(), want), f"{list(x.shape)} {x.dtype} {list(weight.shape)} {config}"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(150, 512), (64, 100), (1, 31)], ids=str)
def test_every_configuration_equals_the_definition(
    config: HeadConfig, dtype: torch.dtype, rows: int, columns: int, device: torch.device
) -> None:
    """Full and ragged tiles of tokens, of rows and of columns."""
    for tokens in {1, min(config.block_m, 16), config.block_m + 1}:
        assert_equal(*draw(rows, columns, tokens, device, dtype), config)


def test_token_tiles_in_groups(device: torch.device) -> None:
    """More token tiles than share a piece of the weights, the last group incomplete."""
    assert_equal(*draw(130, 64, 8 * (triton_head.GROUP_M + 2) + 3, device), CONFIGS[0])


@pytest.mark.parametrize("columns", [64, triton_head.QUANTIZE_STEP, 2 * triton_head.QUANTIZE_STEP + 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_quantized_as_defined(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x, *_ = draw(1, columns, 4, device, dtype)
    x[3] *= 2.0**-20
    codes, scale = triton_head.quantize_tokens(x)
    want, want_scale = head.quantize_tokens(x.cpu())
    assert (codes.dtype, codes.shape) == (torch.int8, (4, 2, columns))
    assert torch.equal(codes[:, 0].cpu().int() * 256 + codes[:, 1].cpu(), want)
    assert torch.equal(scale.cpu(), want_scale)
    assert codes[:, 0].min() >= -127


@pytest.mark.parametrize("magnitude", [1e-45, 3e-45, 1e-41, 1e-38, 3e38])
def test_smallest_and_largest_numbers(magnitude: float, device: torch.device) -> None:
    """Where the step is subnormal or zero the codes saturate, as the reference implementation's."""
    x = torch.linspace(-1, 1, 33).unsqueeze(0) * magnitude
    codes, scale = triton_head.quantize_tokens(x.to(device))
    want, want_scale = head.quantize_tokens(x)
    assert torch.equal(codes[:, 0].cpu().int() * 256 + codes[:, 1].cpu(), want)
    assert torch.equal(scale.cpu(), want_scale)


@pytest.mark.parametrize("columns", [4096, 16_500])
def test_largest_sums_do_not_overflow(columns: int, device: torch.device) -> None:
    weight = torch.full((5, columns), 127, dtype=torch.int8)
    weight[1], weight[2] = -127, -128
    weight[3, ::2] = -127
    for value in (1.0, -1.0):
        x = torch.full((3, columns), value)
        assert_equal(x.to(device), weight.to(device), torch.ones(5).to(device))


def test_widest_sums_do_not_overflow(device: torch.device) -> None:
    """At the bound, with the largest products that either half can make (in parts: the interpreter is slow)."""
    assert triton_head.MAX_COLUMNS * 128 * 128 < 2**31
    assert TritonHead().can_implement(HeadSpec(8, triton_head.MAX_COLUMNS + 1), torch.device("cuda"))[1] == (
        "sums over 131072 columns do not fit 32 bits"
    )
    x = torch.full((1, triton_head.MAX_COLUMNS), 128.0)
    x[0, 0] = head.Q_MAX  # codes 128: high 1, low -128
    weight = torch.full((2, triton_head.MAX_COLUMNS), -128, dtype=torch.int8)
    weight[1] = 127
    assert_equal(x.to(device), weight.to(device), torch.ones(2).to(device))


def test_strided_rows_and_leading_axes(device: torch.device) -> None:
    _, weight, weight_scale = draw(70, 96, 1, device)
    wide = torch.randn(6, 200, generator=torch.Generator().manual_seed(5)).to(device)
    for x in (wide[:, 3:99], wide[::2, :96], wide[:, :96].reshape(2, 3, 96), wide[0, :96], wide[:, :192:2]):
        assert_equal(x, weight, weight_scale)
    assert triton_head.head(wide[:0, :96], weight, weight_scale).shape == (0, 70)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("columns", [64, triton_head.QUANTIZE_STEP + 8])
def test_what_is_not_finite_stays_in_its_row(value: float, columns: int, device: torch.device) -> None:
    x, weight, weight_scale = draw(40, columns, 3, device)
    x[1, 5] = value
    y = triton_head.head(x, weight, weight_scale)
    assert y[1].isnan().all()
    want = head.head_reference(x[::2].cpu(), weight.cpu(), weight_scale.cpu())
    assert torch.equal(y[::2].cpu(), want)


def test_misfits_are_refused(device: torch.device) -> None:
    x, weight, weight_scale = draw(40, 64, 2, device)
    for wrong in (x[:, :32], x.double()):
        with pytest.raises(BackendError, match=r"x: expected .* \[\.\.\., 64\], found"):
            triton_head.head(wrong, weight, weight_scale)
    for codes in (weight.int(), weight.repeat(1, 2)[:, ::2]):
        with pytest.raises(BackendError, match="weight_int8: expected"):
            triton_head.head(x, codes, weight_scale)
    for scales in (weight_scale[:3], weight_scale.double()):
        with pytest.raises(BackendError, match=r"weight_scale: expected float32 \[40\], found"):
            triton_head.head(x, weight, scales)


def test_the_op_agrees_with_its_fake(device: torch.device) -> None:
    x, weight, weight_scale = draw(33, 100, 3, device)
    torch.library.opcheck(torch.ops.bwla.head_triton.default, (x, weight, weight_scale))
    backend, spec = TritonHead(), HeadSpec(33, 100)
    prepared = backend.prepare({"weight_int8": weight, "weight_scale": weight_scale}, spec)
    compiled = torch.compile(
        lambda x: backend.apply(x, prepared, spec) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), backend.apply(x, prepared, spec) * 2)


def test_configurations_follow_the_tokens() -> None:
    def chosen(capability: tuple[int, int]) -> list[int]:
        return [select_config(tokens, capability).block_m for tokens in (1, 8, 9, 32, 33, 64, 65, 5000)]

    assert chosen((9, 0)) == [8, 8, 16, 32, 64, 64, 128, 128]
    assert chosen((8, 0)) == chosen((12, 0)) == [8, 8, 16, 32, 64, 64, 64, 64]


def test_the_self_check(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes sound kernels and names a wrong one."""
    triton_head.self_check(device)
    triton_head.self_check(device, torch.float16, 137)

    def wrong(x: Tensor, pdl: bool = False) -> tuple[Tensor, Tensor]:
        codes, scale = quantize(x, pdl)
        return codes.flip(1), scale

    quantize = triton_head.quantize_tokens
    monkeypatch.setattr(triton_head, "quantize_tokens", wrong)
    with pytest.raises(BackendError, match=r"8-bit head \(64x8x256 w4 s4\) is wrong on .* report this"):
        triton_head.self_check(device)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, spec = torch.device("cuda", 0), HeadSpec(40, 64)
    able, reason = TritonHead().can_implement(spec, torch.device("cpu"))
    assert not able
    assert "NVIDIA GPU" in reason
    monkeypatch.setattr(triton_gpu, "gpu_properties", lambda device: triton_gpu.GpuProperties((7, 5), 40))
    with pytest.raises(BackendError, match=r"need compute capability 8\.0 or newer, found 7\.5"):
        ops.select_head_backend(spec, gpu, "triton")
    monkeypatch.setattr(triton_gpu, "gpu_properties", lambda device: triton_gpu.INTERPRETER)
    assert ops.select_head_backend(spec, gpu)[0].name == "triton"
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in TritonHead().can_implement(spec, gpu)[1]
    assert ops.select_head_backend(spec, gpu)[0].name == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_random_heads_on_a_gpu() -> None:
    """300 random heads, each in the configuration that serving would choose."""
    device, draws = torch.device("cuda"), random.Random(0)
    for _ in range(300):
        columns = draws.choice([16 * draws.randint(1, 600), 256 * draws.randint(1, 40)])
        tokens = draws.choice([1, 1, 2, 8, draws.randint(3, 32), draws.randint(33, 600)])
        assert_equal(*draw(16 * draws.randint(1, 300), columns, tokens, device, draws.choice(DTYPES)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("pdl", [False, True])
def test_a_cuda_graph_replays_it(pdl: bool) -> None:
    if pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launches need compute capability 9.0")
    x, weight, weight_scale = draw(4096, 1024, 3, torch.device("cuda"), torch.bfloat16)
    triton_head.head(x, weight, weight_scale, pdl=pdl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton_head.head(x, weight, weight_scale, pdl=pdl)
    for factor in (1.0, -3.0):
        x *= factor
        graph.replay()
        assert torch.equal(y, triton_head.head(x, weight, weight_scale))
