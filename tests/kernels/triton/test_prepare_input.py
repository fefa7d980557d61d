"""The GPU's input transform equals the reference implementation, in Triton's interpreter or on a GPU.

A code may differ only where x_hat / scale lies on a rounding tie to within the error of a float32 rotation;
`assert_close_to` checks that against float64.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.prepare_config import (
    PLANES_MAX_TOKENS,
    FewConfig,
    InputConfig,
    select_few,
    select_many,
)
from bwla_kernels.triton.prepare_input import FusedInput, prepare_input
from input_transform import assert_close_to, make_input, make_layer, make_spec, reference_planes

TENSOR_CORES = torch.cuda.is_available()


SHAPES = [
    (1, 16, 16, 3),
    (1, 8, 80, 1),
    (1, 5, 32, 2),  # n1 padded
    (2, 20, 24, 8),  # both padded
    (3, 4, 24, 5),
    (1, 32, 32, 7),
    (1, 2, 112, 4),  # three pieces
    (1, 1, 128, 1),
    (2, 40, 12, 2),
]


@pytest.mark.parametrize(("blocks", "n1", "n2", "m"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_matches_the_definition(
    blocks: int, n1: int, n2: int, m: int, dtype: torch.dtype, device: torch.device
) -> None:
    spec = make_spec(blocks, n1, n2, rank=5, clip=0.9)
    tensors = make_layer(spec, device)
    x = make_input(m, spec.in_features, dtype, device)
    assert_close_to(prepare_input(x, tensors, spec), x, tensors, spec)


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_bits(bits: int, device: torch.device) -> None:
    spec = make_spec(2, 8, 20, bits=bits)
    tensors = make_layer(spec, device)
    x = make_input(4, spec.in_features, torch.float16, device)
    prepared = prepare_input(x, tensors, spec)
    assert prepared.q.abs().max() == spec.q_max
    assert_close_to(prepared, x, tensors, spec)


@pytest.mark.parametrize("rank", [0, 1, 3, 16, 20])
@pytest.mark.parametrize("m", [1, 6])
def test_ranks(rank: int, m: int, device: torch.device) -> None:
    spec = make_spec(1, 12, 24, rank=rank)
    tensors = make_layer(spec, device)
    x = make_input(m, spec.in_features, torch.float16, device)
    assert_close_to(prepare_input(x, tensors, spec), x, tensors, spec)


@pytest.mark.parametrize("config_m", [8, 200, 5000])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("n2", [40, 80, 104])
def test_every_kind_of_configuration_is_right(
    config_m: int, capability: tuple[int, int], n2: int, device: torch.device
) -> None:
    spec = make_spec(2, 12, n2, rank=3)
    tensors = make_layer(spec, device)
    x = make_input(6, spec.in_features, torch.float16, device)
    config = select_many(spec, config_m, capability)
    assert_close_to(prepare_input(x, tensors, spec, config=config), x, tensors, spec)


@pytest.mark.parametrize(("n1", "n2"), [(3, 32), (16, 16), (12, 40), (20, 80), (72, 100)])
@pytest.mark.parametrize("rank", [0, 1, 35])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_programs_that_share_a_token(
    n1: int, n2: int, rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    """The last program of a block quantizes it, the last one of a token adds u; counters end as they began."""
    spec = make_spec(2, n1, n2, rank=rank)
    tensors = make_layer(spec, device)
    tensors["split_counters"] = torch.zeros(64, dtype=torch.int32, device=device)
    x = make_input(6, spec.in_features, dtype, device)
    prepared = prepare_input(x, tensors, spec, config=select_few(spec))
    assert_close_to(prepared, x, tensors, spec)
    assert not tensors["split_counters"].any()
    again = prepare_input(x[2:3], tensors, spec, config=select_few(spec))
    assert torch.equal(again.q, prepared.q[2:3])
    assert torch.equal(again.scale, prepared.scale[2:3])
    assert again.u is None or torch.equal(again.u, prepared.u[2:3])


def test_several_tokens_share_a_tile(device: torch.device) -> None:
    """One token's outlier must not touch the scale of its neighbours, nor a missing neighbour anything."""
    spec = make_spec(2, 8, 16, rank=2)
    tensors = make_layer(spec, device)
    config = dataclasses.replace(select_many(spec, 1, (9, 0)), tokens=4)
    x = make_input(6, spec.in_features, torch.float32, device)
    x[1] *= 1e6
    together = prepare_input(x, tensors, spec, config=config)
    assert_close_to(together, x, tensors, spec)
    alone = prepare_input(x[2:3], tensors, spec, config=config)
    assert torch.equal(alone.q, together.q[2:3])
    assert torch.equal(alone.scale, together.scale[2:3])


@pytest.mark.parametrize(
    "select", [lambda spec: select_few(spec), lambda spec: select_many(spec, 600, (9, 0))]
)
def test_any_rank(select: Callable[[LayerSpec], FewConfig | InputConfig], device: torch.device) -> None:
    for rank in range(65):
        spec = make_spec(1, 8, 16, rank=rank)
        tensors = make_layer(spec, device)
        x = make_input(3, spec.in_features, torch.float16, device)
        assert_close_to(prepare_input(x, tensors, spec, config=select(spec)), x, tensors, spec)


@pytest.mark.parametrize("chunk", [128, 256])
@pytest.mark.parametrize(
    ("blocks", "n1", "n2", "bits"), [(1, 16, 16, 6), (2, 8, 20, 8), (3, 4, 40, 2), (1, 12, 24, 6)]
)
def test_bit_planes(blocks: int, n1: int, n2: int, bits: int, chunk: int, device: torch.device) -> None:
    spec = make_spec(blocks, n1, n2, bits=bits)
    tensors = make_layer(spec, device)
    x = make_input(3, spec.in_features, torch.float16, device)
    prepared = prepare_input(x, tensors, spec, planes=True, chunk=chunk)
    assert prepared.planes is not None
    assert torch.equal(prepared.planes.cpu(), reference_planes(prepared.q.cpu(), spec, chunk))
    assert_close_to(prepared, x, tensors, spec)


def test_zeros_and_extreme_magnitudes(device: torch.device) -> None:
    spec = make_spec(1, 16, 16, rank=2)
    tensors = make_layer(spec, device)
    x = make_input(6, spec.in_features, torch.float32, device)
    x[0] = 0
    x[1] *= 1e30 / x[1].abs().max()
    x[2] *= 1e-30 / x[2].abs().max()
    x[3] = 0
    x[3, 7] = 3.0
    prepared = prepare_input(x, tensors, spec)
    assert prepared.scale[0] == 0
    assert not prepared.q[0].any()
    assert_close_to(prepared, x, tensors, spec)


def test_nan_and_infinity_where_programs_share_a_token(device: torch.device) -> None:
    """Also NaN as a GPU makes it, all ones, which a carry would turn into -0."""
    spec = make_spec(2, 16, 16)
    tensors = make_layer(spec, device)
    x = make_input(4, spec.in_features, torch.float32, device)
    x[0, 5] = float("nan")
    x[1, 300] = float("inf")
    x[2, 7] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    scale = prepare_input(x, tensors, spec, config=select_few(spec)).scale.isfinite()
    assert scale.tolist() == [[False, True], [True, False], [False, True], [True, True]]


@pytest.mark.parametrize("shared", [1, 4])
def test_nan_and_infinity_stay_in_their_token_and_block(shared: int, device: torch.device) -> None:
    spec = make_spec(2, 16, 16)
    tensors = make_layer(spec, device)
    x = make_input(3, spec.in_features, torch.float16, device)
    x[0, 5] = float("nan")
    x[1, 300] = float("inf")
    config = dataclasses.replace(select_many(spec, 1, (9, 0)), tokens=shared)
    scale = prepare_input(x, tensors, spec, config=config).scale
    assert not scale[0, 0].isfinite()
    assert not scale[1, 1].isfinite()
    assert scale[0, 1].isfinite()
    assert scale[2].isfinite().all()


def test_strided_rows(device: torch.device) -> None:
    spec = make_spec(1, 16, 24, rank=4)
    tensors = make_layer(spec, device)
    wide = make_input(5, spec.in_features * 2 + 3, torch.float16, device)
    x = wide[:, 3 : 3 + spec.in_features]
    assert_close_to(prepare_input(x, tensors, spec), x, tensors, spec)


def test_no_tokens(device: torch.device) -> None:
    spec = make_spec(2, 16, 16, rank=4)
    prepared = prepare_input(
        torch.empty(0, spec.in_features, device=device), make_layer(spec, device), spec, planes=True
    )
    assert prepared.q.shape == (0, spec.in_features)
    assert prepared.u is not None
    assert prepared.u.shape == (0, 4)


def test_split_rotations_add_up(device: torch.device) -> None:
    tensors = make_layer(make_spec(2, 20, 24), device)
    left, right = tensors["left_split"].double().sum(1) / 64, tensors["right_split"].double().sum(1) / 64
    assert left.shape == (2, 32, 32)
    assert right.shape == (2, 32, 32)
    assert (left[:, :20, :20] - tensors["rotation_left"].transpose(1, 2)).abs().max() <= 2.0**-24
    assert (right[:, :24, :24] - tensors["rotation_right"]).abs().max() <= 2.0**-24
    assert not left[:, 20:].any()
    assert not right[:, :, 24:].any()


def test_refuses_what_it_cannot_do(device: torch.device) -> None:
    spec = make_spec(1, 16, 16)
    tensors = make_layer(spec, device)
    x = make_input(5, 256, torch.float16, device)
    with pytest.raises(BackendError, match="2..8 bits, found 16"):
        prepare_input(x, tensors, dataclasses.replace(spec, bits=16))
    with pytest.raises(BackendError, match="expected an input \\[M, 256\\]"):
        prepare_input(x[:, :128], tensors, spec)
    with pytest.raises(BackendError, match="contiguous rows"):
        prepare_input(torch.empty(256, 5, device=device).t(), tensors, spec)
    with pytest.raises(BackendError, match="at most 8 tokens"):
        prepare_input(make_input(9, 256, torch.float16, device), tensors, spec, planes=True)
    with pytest.raises(BackendError, match="only the kernel for few tokens"):
        prepare_input(x, tensors, spec, planes=True, config=select_many(spec, 5, (9, 0)))
    with pytest.raises(BackendError, match="needs norm_weight"):
        prepare_input(x, tensors, spec, fused=FusedInput(residual=x))
    with pytest.raises(BackendError, match="left_split: expected contiguous"):
        prepare_input(x, {**tensors, "left_split": tensors["rotation_left"]}, spec)
    with pytest.raises(BackendError, match="found 2 x 192"):
        prepare_input(make_input(1, 384, torch.float16, device), tensors, make_spec(1, 2, 192))


RANDOM_LAYERS = 40
"""Each compiles a kernel or two of its own, a few seconds each."""


@pytest.mark.gpu
@pytest.mark.skipif(not TENSOR_CORES, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("seed", range(RANDOM_LAYERS))
def test_random_layers_on_a_gpu(seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    words = 0
    while words == 0:
        n1, n2 = pick(*range(1, 129)), pick(*range(1, 129))
        words = 1 if n1 * n2 % 32 == 0 else 0
    spec = make_spec(
        pick(1, 1, 2, 3, 8),
        n1,
        n2,
        rank=pick(0, 1, 7, 16, 40, 100),
        bits=pick(*range(2, 9)),
        clip=pick(7, 10) / 10,
    )
    tensors = make_layer(spec, device, seed)
    m = pick(1, 2, 4, 8, 31, 64, 129, 300, 1025)
    dtype = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)[pick(0, 1, 2, 3)]
    x = make_input(m, spec.in_features, dtype, device, seed)
    prepared = prepare_input(x, tensors, spec, planes=m <= PLANES_MAX_TOKENS, chunk=pick(128, 256))
    assert_close_to(prepared, x, tensors, spec)
    again = prepare_input(x, tensors, spec)
    assert torch.equal(prepared.q, again.q)
    assert prepared.u is None or torch.equal(prepared.u, again.u)
