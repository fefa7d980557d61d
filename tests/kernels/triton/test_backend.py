"""The GPU backend: results, refusals, and that a request never waits for a compiler."""

import pytest
import torch
from bwla_kernels import ops, reference
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton import gpu as triton_gpu
from bwla_kernels.triton.backend import TritonBackend
from bwla_kernels.triton.layout import chunk_layout
from bwla_kernels.triton.prepare_input import select_config as select_input
from bwla_kernels.triton.tuning import select_config
from bwla_kernels.triton.warm_up import configs

SPECS = [
    LayerSpec(40, 256, 1, 16, 16, rank=3, bias=True),
    LayerSpec(70, 256, 2, 8, 16, rank=0),
    LayerSpec(33, 96, 1, 8, 12, rank=16, bits=8, clip=0.9),
    LayerSpec(40, 256, 1, 16, 16, rank=3, bias=True, planes=2),
    LayerSpec(70, 256, 2, 8, 16, planes=3),
    LayerSpec(33, 96, 1, 8, 12, rank=16, planes=4),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 9])
def test_equals_the_reference(spec: LayerSpec, tokens: int, make_layer, device: torch.device) -> None:
    layer = {name: tensor.to(device) for name, tensor in make_layer(spec, 3).items()}
    backend = TritonBackend()
    prepared = backend.prepare(layer, spec)
    x = torch.randn(tokens, spec.in_features, generator=torch.Generator().manual_seed(4)).to(device)
    y, expected = backend.apply(x, prepared, spec), reference.linear(x, layer, spec)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    # A code may differ at a rounding tie: bound the whole, not each element.
    assert (y - expected).norm() <= 2e-3 * expected.norm().clamp_min(1e-6)


def test_leading_axes_and_compilation(make_layer, device: torch.device) -> None:
    spec = SPECS[0]
    backend = TritonBackend()
    prepared = backend.prepare({name: t.to(device) for name, t in make_layer(spec, 5).items()}, spec)
    x = torch.randn(2, 2, spec.in_features, generator=torch.Generator().manual_seed(6)).to(device)
    compiled = torch.compile(
        lambda x: backend.apply(x, prepared, spec) * 2, fullgraph=True, backend="aot_eager"
    )
    y = backend.apply(x, prepared, spec)
    assert y.shape == (2, 2, spec.out_features)
    torch.testing.assert_close(compiled(x), y * 2)


def test_fake_tensors_suffice(make_layer) -> None:
    """vLLM traces the model without running it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = SPECS[0]
    prepared = TritonBackend().prepare(make_layer(spec, 7), spec)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in prepared.items()}
        y = TritonBackend().apply(torch.empty(5, spec.in_features, dtype=torch.bfloat16), fakes, spec)
    assert (tuple(y.shape), y.dtype) == ((5, spec.out_features), torch.bfloat16)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, spec = torch.device("cuda", 0), SPECS[0]
    able, reason = TritonBackend().can_implement(spec, torch.device("cpu"))
    assert not able
    assert "NVIDIA GPU" in reason
    monkeypatch.setattr(triton_gpu, "gpu_properties", lambda device: triton_gpu.GpuProperties((7, 5), 40))
    with pytest.raises(BackendError, match=r"need compute capability 8\.0 or newer, found 7\.5"):
        ops.select_backend(spec, gpu, "triton")
    monkeypatch.setattr(triton_gpu, "gpu_properties", lambda device: triton_gpu.INTERPRETER)
    assert TritonBackend().can_implement(spec, gpu)[0]
    assert all(TritonBackend().can_implement(other, gpu)[0] for other in SPECS)
    weight_only = LayerSpec(40, 256, 1, 16, 16, bits=16)
    assert "quantized activations" in TritonBackend().can_implement(weight_only, gpu)[1]
    monkeypatch.setattr(triton_gpu.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in TritonBackend().can_implement(spec, gpu)[1]


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize(
    ("n", "k", "blocks", "n1", "n2"),
    [(51200, 5120, 1, 64, 80), (5120, 25600, 8, 40, 80), (1024, 2048, 8, 16, 16)],
)
def test_every_request_was_met_at_load(
    capability: tuple[int, int], n: int, k: int, blocks: int, n1: int, n2: int, planes: int
) -> None:
    spec = LayerSpec(n, k, blocks, n1, n2, rank=16, planes=planes)
    compiled = configs(spec, capability, 132).keys()
    chunk = chunk_layout(n, blocks, spec.group_width).chunk
    for m in [*range(1, 700), *range(700, 20000, 331)]:
        matmul = select_config(n, k, blocks, chunk, m, spec.bits, capability, 132, planes)
        assert (matmul, select_input(spec, m, capability)) in compiled, m
