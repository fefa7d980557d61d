"""Operations fused into the input transform: norms, the residual's addition, SiLU * mul, rounded as in vLLM."""

import pytest
import torch
from bwla_kernels.triton.prepare_config import select_config
from bwla_kernels.triton.prepare_input import FusedInput, prepare_input
from input_transform import assert_fused, make_input, make_layer, make_spec, vllm_rms_norm

TENSOR_CORES = torch.cuda.is_available()


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(blocks: int, m: int, with_residual: bool, device: torch.device) -> None:
    spec = make_spec(blocks, 12, 24, rank=3)
    tensors = make_layer(spec, device)
    x = make_input(m, spec.in_features, torch.float16, device)
    weight = make_input(1, spec.in_features, torch.float16, device, seed=5)[0].abs() / 50 + 0.5
    residual = make_input(m, spec.in_features, torch.float16, device, seed=6) if with_residual else None
    before = x.clone()
    prepared = prepare_input(x, tensors, spec, fused=FusedInput(weight, 1e-5, residual))
    normed, total = vllm_rms_norm(x, weight, 1e-5, residual)
    assert_fused(prepared, normed, tensors, spec)
    assert torch.equal(x, before)
    if with_residual:
        assert prepared.residual is not None
        assert torch.equal(prepared.residual, total)
    else:
        assert prepared.residual is None


@pytest.mark.parametrize("config_m", [1, 8, 5000])
def test_rms_norm_in_every_kind_of_configuration(config_m: int, device: torch.device) -> None:
    spec = make_spec(2, 12, 24, rank=3)
    tensors = make_layer(spec, device)
    x = make_input(5, spec.in_features, torch.float16, device)
    weight = torch.linspace(0.5, 2, spec.in_features).half().to(device)
    config = select_config(spec, config_m, (9, 0))
    prepared = prepare_input(x, tensors, spec, fused=FusedInput(weight, 1e-6), config=config)
    assert_fused(prepared, vllm_rms_norm(x, weight, 1e-6, None)[0], tensors, spec)


@pytest.mark.parametrize("m", [1, 6])
def test_silu_mul(m: int, device: torch.device) -> None:
    spec = make_spec(2, 12, 24, rank=3)
    tensors = make_layer(spec, device)
    generator = torch.Generator().manual_seed(3)
    x = (3 * torch.randn(m, 2 * spec.in_features, generator=generator)).half().to(device)
    gate, up = x.chunk(2, dim=1)
    wanted = torch.nn.functional.silu(gate) * up
    assert_fused(prepare_input(x, tensors, spec, fused=FusedInput(silu_mul=True)), wanted, tensors, spec)


@pytest.mark.gpu
@pytest.mark.skipif(not TENSOR_CORES, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "rotation", [(1, 64, 80), (8, 40, 80), (1, 64, 64), (8, 32, 32), (1, 128, 128), (1, 112, 128)]
)
@pytest.mark.parametrize("m", [1, 3, 17, 130, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_variants_on_a_gpu(
    rotation: tuple[int, int, int], m: int, dtype: torch.dtype, device: torch.device
) -> None:
    spec = make_spec(*rotation, rank=16)
    tensors = make_layer(spec, device)
    x = make_input(m, 2 * spec.in_features, dtype, device).clamp(-1000, 1000)
    gate, up = x.chunk(2, dim=1)
    silu = torch.nn.functional.silu(gate) * up
    assert_fused(prepare_input(x, tensors, spec, fused=FusedInput(silu_mul=True)), silu, tensors, spec)
    weight = (torch.rand(spec.in_features, device=device) + 0.5).to(dtype)
    normed, total = vllm_rms_norm(gate, weight, 1e-6, up)
    prepared = prepare_input(gate, tensors, spec, fused=FusedInput(weight, 1e-6, up))
    assert_fused(prepared, normed, tensors, spec)
    assert prepared.residual is not None
    assert torch.equal(prepared.residual, total)
