"""Layers with scales for groups of columns on a GPU: codes equal to the reference's, the GEMM against float64."""

import random

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton import grouped, grouped_backend
from bwla_kernels.triton.backend import TritonBackend
from bwla_kernels.triton.grouped import (
    CONFIG,
    GroupedConfig,
    can_quantize,
    quantize_groups,
    repack_grouped,
    run_grouped,
)
from bwla_kernels.triton.grouped_backend import check_grouped
from random_tensors import normal, random_layer
from torch import Tensor


def to(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def random_specs(count: int, seed: int) -> list[tuple[LayerSpec, int]]:
    rng = random.Random(seed)
    specs = []
    for _ in range(count):
        width = 32 * rng.choice([1, 2, 3, 4, 4, 4, 8, 8, 12])
        groups = rng.choice([1, 1, 2, 3, 5])
        spec = LayerSpec(
            rng.randint(1, 150),
            groups * width,
            groups,
            1,
            width,
            bits=rng.choice([2, 4, 6, 8, 8]),
            clip=rng.choice([1.0, 0.85]),
            bias=rng.choice([True, False]),
            planes=rng.choice([1, 1, 2, 3, 4]),
            grouped=True,
        )
        specs.append((spec, rng.choice([1, 2, 5, 17])))
    return specs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_codes_and_scales_are_the_references(seed: int, dtype: torch.dtype, device: torch.device) -> None:
    for spec, tokens in random_specs(8, seed):
        x = normal(tokens, spec.in_features, seed=seed).to(dtype)
        x[0, :32] = 0
        q, scale = quantize_groups(x.to(device), spec)
        want_q, want_scale = reference.quantize(x.float(), spec.rotation_groups, spec.bits, spec.clip)
        assert torch.equal(scale.cpu().t(), want_scale)
        assert torch.equal(q.cpu(), want_q)


@pytest.mark.parametrize("seed", range(6))
def test_random_layers(seed: int, device: torch.device) -> None:
    for number, (spec, tokens) in enumerate(random_specs(6, 100 + seed)):
        layer, x = random_layer(spec, number), normal(tokens, spec.in_features, seed=number)
        y = run_grouped(x.to(device), repack_grouped(to(device, layer), spec), spec).cpu()
        exact = {
            name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in layer.items()
        }
        q, scale = reference.quantize(x, spec.rotation_groups, spec.bits, spec.clip)
        codes = (q.double().unflatten(1, (spec.rotation_groups, -1)) * scale.double().unsqueeze(-1)).flatten(
            1
        )
        weight = reference.dequantize(layer, spec).double()
        want, size = codes @ weight.t(), codes.abs() @ weight.abs().t()
        if spec.bias:
            want = want + exact["bias"]
        terms = spec.planes * spec.rotation_groups + 8
        assert ((y.double() - want).abs() <= terms * 2**-23 * (size + want.abs()) + 1e-30).all(), (
            spec,
            tokens,
        )


@pytest.mark.parametrize("config", [CONFIG, GroupedConfig(32, 16), GroupedConfig(64, 32, 8)])
@pytest.mark.parametrize(("width", "groups"), [(128, 4), (256, 2), (96, 3), (640, 1)])
def test_every_configuration(config: GroupedConfig, width: int, groups: int, device: torch.device) -> None:
    spec = LayerSpec(70, width * groups, groups, 1, width, bits=8, bias=True, planes=2, grouped=True)
    layer, x = random_layer(spec, 1), normal(18, spec.in_features)
    y = run_grouped(x.to(device), repack_grouped(to(device, layer), spec), spec, config).cpu()
    torch.testing.assert_close(y, reference.linear(x, layer, spec), rtol=1e-4, atol=1e-4)


def test_not_a_number_stays_in_its_token_and_group(device: torch.device) -> None:
    spec = LayerSpec(40, 128, 2, 1, 64, bits=8, grouped=True)
    layer, x = random_layer(spec, 1), normal(3, 128)
    x[1, 70] = float("nan")
    _q, scale = quantize_groups(x.to(device), spec)
    assert scale.cpu().isnan().nonzero().tolist() == [[1, 1]]
    y = run_grouped(x.to(device), repack_grouped(to(device, layer), spec), spec).cpu()
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], reference.linear(x[[0, 2]], layer, spec), rtol=1e-4, atol=1e-4)


def test_no_tokens(device: torch.device) -> None:
    spec = LayerSpec(40, 128, 2, 1, 64, bits=8, grouped=True)
    prepared = repack_grouped(to(device, random_layer(spec, 1)), spec)
    assert run_grouped(torch.zeros(2, 0, 128, device=device), prepared, spec).shape == (2, 0, 40)


def test_the_backend_runs_them(device: torch.device) -> None:
    spec = LayerSpec(40, 256, 2, 1, 128, bits=8, bias=True, planes=2, grouped=True)
    layer, x = to(device, random_layer(spec, 1)), normal(3, 256).to(device)
    backend = TritonBackend()
    prepared = backend.prepare(layer, spec)
    y = backend.apply(x, prepared, spec)
    torch.testing.assert_close(y, reference.linear(x, layer, spec), rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    backend.apply(x, prepared, spec).sum().backward()
    weight = reference.dequantize(layer, spec)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_the_check_at_load_passes_and_fails_on_wrong_numbers(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LayerSpec(40, 256, 2, 1, 128, bits=8, grouped=True)
    monkeypatch.setattr(grouped_backend, "_checked", set())
    check_grouped(spec, torch.float32, device)
    right = grouped.run_grouped
    monkeypatch.setattr(grouped, "run_grouped", lambda *arguments: right(*arguments) * 1.1)
    check_grouped(spec, torch.float32, device)  # once for each kind of layer
    with pytest.raises(
        BackendError, match="compute wrong numbers for layers with scales for groups of 64 columns"
    ):
        check_grouped(LayerSpec(40, 256, 4, 1, 64, bits=8, grouped=True), torch.float32, device)


def test_groups_that_are_too_wide() -> None:
    assert can_quantize(LayerSpec(8, 1 << 15, 1, 1, 1 << 15, bits=8, grouped=True))[0]
    able, reason = can_quantize(LayerSpec(8, 1 << 16, 1, 1, 1 << 16, bits=8, grouped=True))
    assert not able
    assert "groups of up to 32768 columns, found 65536" in reason
