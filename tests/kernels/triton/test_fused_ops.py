"""The ops that compute a norm, an addition or SiLU * mul where a layer loads its input, against doing it before."""

import pytest
import torch
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton.backend import TritonBackend
from torch import Tensor

SPECS = [LayerSpec(40, 256, 1, 16, 16, rank=3, bias=True), LayerSpec(70, 256, 2, 8, 16, planes=2)]
EPSILON = 1e-3


def arguments(prepared: dict[str, Tensor], spec: LayerSpec) -> tuple[object, ...]:
    """The op's arguments after x, as `TritonBackend.apply` passes them."""
    names = ("weight_chunks", "weight_scale", "split_counters", "left_split", "right_split", "column_scale")
    optional = ("low_rank_a", "low_rank_b", "bias")
    sizes = (spec.out_features, spec.rotation_groups, spec.n1, spec.n2, spec.rank, spec.bits, spec.clip)
    sizes = (*sizes, spec.planes)
    return (*(prepared[name] for name in names), *(prepared.get(name) for name in optional), *sizes)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x float32 [M, K], normalized and rounded as vLLM does."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
    return normed.to(weight.dtype) * weight


def close(found: Tensor, expected: Tensor) -> bool:
    # A code may differ at a rounding tie: bound the whole, not each element.
    return bool((found.float() - expected.float()).norm() <= 5e-3 * expected.float().norm())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("tokens", [1, 6])
def test_equal_to_what_comes_before(spec: LayerSpec, tokens: int, make_layer, device: torch.device) -> None:
    layer = {name: tensor.to(device) for name, tensor in make_layer(spec, 3).items()}
    backend = TritonBackend()
    prepared = backend.prepare(layer, spec)
    rest = arguments(prepared, spec)
    generator = torch.Generator().manual_seed(4)
    k = spec.in_features
    x, residual = (torch.randn(tokens, k, generator=generator).half().to(device) for _ in range(2))
    weight = (torch.rand(k, generator=generator) + 0.5).half().to(device)
    ops = torch.ops.bwla

    y = ops.rms_norm_linear_triton(x, *rest, weight, EPSILON)
    assert (y.shape, y.dtype) == ((tokens, spec.out_features), torch.float16)
    assert close(y, backend.apply(rms_norm(x.float(), weight), prepared, spec))
    assert not close(y, backend.apply(x, prepared, spec))

    y, total = ops.add_rms_norm_linear_triton(x, *rest, weight, EPSILON, residual)
    exact = x.float() + residual.float()
    assert torch.equal(total, exact.half())
    assert close(y, backend.apply(rms_norm(exact, weight), prepared, spec))

    gate_up = torch.cat([x, residual], -1)
    y = ops.silu_mul_linear_triton(gate_up, *rest)
    before = torch.nn.functional.silu(x.float()).half() * residual
    assert close(y, backend.apply(before, prepared, spec))


def test_fakes_have_the_shapes_of_the_results(make_layer, device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = SPECS[0]
    rest = arguments(TritonBackend().prepare(make_layer(spec, 7), spec), spec)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(5, spec.in_features, dtype=torch.bfloat16)
        weight = torch.empty(spec.in_features, dtype=torch.bfloat16)
        y = torch.ops.bwla.rms_norm_linear_triton(x, *rest, weight, EPSILON)
        z, total = torch.ops.bwla.add_rms_norm_linear_triton(x, *rest, weight, EPSILON, x)
        wide = torch.empty(5, 2 * spec.in_features, dtype=torch.bfloat16)
        w = torch.ops.bwla.silu_mul_linear_triton(wide, *rest)
    for found in (y, z, w):
        assert (tuple(found.shape), found.dtype) == ((5, spec.out_features), torch.bfloat16)
    assert (tuple(total.shape), total.dtype) == ((5, spec.in_features), torch.bfloat16)


@pytest.mark.parametrize("fused", ["norm", "add+norm", "silu*mul"])
def test_the_first_call_compiles_for_later_ones(
    fused: str, make_layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first call on a GPU hands to the warm-up: the layer, its tensors, and what is fused."""
    from types import SimpleNamespace

    from bwla_kernels.triton import backend, warm_up

    spec = LayerSpec(40, 256, 1, 16, 16, rank=3)
    prepared = TritonBackend().prepare(make_layer(spec, 7), spec)
    rest = arguments(prepared, spec)
    weight = None if fused == "silu*mul" else torch.ones(spec.in_features, dtype=torch.float16)
    x = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=torch.float16)
    calls = []
    monkeypatch.setattr(warm_up, "warm_up", lambda *given, **named: calls.append((given, named)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backend, "gpu_properties", lambda device: ((9, 0), 132))
    backend._warm_up_fused(fused, x, rest, weight)
    (((given_spec, tensors, dtype, capability, multiprocessors), named),) = calls
    assert (given_spec, dtype, capability, multiprocessors) == (spec, torch.float16, (9, 0), 132)
    assert tensors.keys() == prepared.keys()
    assert all(tensors[name] is prepared[name] for name in prepared)
    assert named == {"fused": fused, "norm_weight": weight}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backend._warm_up_fused(fused, x, rest, weight)
    assert len(calls) == 1, "nothing may be compiled while a CUDA graph is captured"
