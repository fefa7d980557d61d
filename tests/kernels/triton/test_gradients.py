"""Gradients through the GPU ops: those of the dequantized layer, and refusals where there are none."""

import pytest
import torch
from bwla_kernels import gradients, head, reference
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.triton import backend as triton_backend
from bwla_kernels.triton.backend import TritonBackend
from bwla_kernels.triton.head import TritonHead
from bwla_kernels.triton.prepare_input import join_rotations, split_rotations
from random_tensors import normal, random_layer
from torch._subclasses.fake_tensor import FakeTensorMode

SPECS = [
    LayerSpec(40, 256, 1, 16, 16, rank=3, bias=True),
    LayerSpec(170, 256, 2, 8, 16, bits=8, clip=0.9),
    LayerSpec(33, 96, 1, 8, 12, rank=17, planes=2),
    LayerSpec(70, 256, 2, 8, 16, bias=True, planes=3),
    LayerSpec(33, 96, 1, 8, 12, rank=16, planes=4),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCE])
def test_the_gradient_is_that_of_the_dequantized_layer(
    spec: LayerSpec, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "WEIGHTS_AT_ONCE", 100 * 256)
    layer = {name: tensor.to(device) for name, tensor in random_layer(spec, 3).items()}
    prepared = TritonBackend().prepare(layer, spec)
    x = normal(2, 3, spec.in_features).to(device, dtype).requires_grad_()
    upstream = normal(2, 3, spec.out_features, seed=2).to(device, dtype)
    TritonBackend().apply(x, prepared, spec).backward(upstream)
    expected = upstream.float() @ reference.dequantize(layer, spec)
    assert x.grad is not None
    assert (x.grad.dtype, x.grad.shape) == (dtype, x.shape)
    assert (x.grad.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_split_rotations_can_be_joined_again(spec: LayerSpec) -> None:
    layer = random_layer(spec, 4)
    left, right = join_rotations(*split_rotations(layer["rotation_left"], layer["rotation_right"]), spec)
    assert torch.equal(left, layer["rotation_left"].float())
    assert torch.equal(right, layer["rotation_right"].float())


def test_fake_tensors_and_compilation(device: torch.device) -> None:
    spec = SPECS[2]
    layer = {name: tensor.to(device) for name, tensor in random_layer(spec, 5).items()}
    prepared = TritonBackend().prepare(layer, spec)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in prepared.items()}
        x = torch.empty(5, spec.in_features, device=device, requires_grad=True)
        TritonBackend().apply(x, fakes, spec).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    compiled = torch.compile(
        lambda x: TritonBackend().apply(x, prepared, spec) * 2, fullgraph=True, backend="aot_eager"
    )
    x = normal(3, spec.in_features).to(device).requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None
    expected = 2 * reference.dequantize(layer, spec).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("rms_norm_linear_triton", lambda x: (torch.ones_like(x[0]), 1e-6)),
        ("add_rms_norm_linear_triton", lambda x: (torch.ones_like(x[0]), 1e-6, x.detach())),
        ("silu_mul_linear_triton", lambda x: ()),
    ],
)
def test_the_fused_ops_refuse_a_backward_pass(name: str, fused, device: torch.device) -> None:
    """vLLM's compiler inserts them; a graph that needs gradients has none of them."""
    spec = SPECS[0]
    layer = {key: tensor.to(device) for key, tensor in random_layer(spec, 6).items()}
    prepared = TritonBackend().prepare(layer, spec)
    tensors = [prepared.get(key) for key in triton_backend._TENSORS]
    width = spec.in_features * (2 if name.startswith("silu") else 1)
    x = normal(2, width).to(device).requires_grad_()
    sizes = (40, 1, 16, 16, 3, 6, 1.0, 1)
    result = getattr(torch.ops.bwla, name).default(x, *tensors, *sizes, *fused(x))
    y = result[0] if isinstance(result, tuple) else result
    with pytest.raises(BackendError, match=f"bwla::{name} has no gradient: it is for inference only"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [*TOLERANCE])
def test_the_head(dtype: torch.dtype, device: torch.device) -> None:
    tensors = {key: tensor.to(device) for key, tensor in head.quantize_head(normal(70, 96) * 0.02).items()}
    spec = HeadSpec(70, 96)
    prepared = TritonHead().prepare(tensors, spec)
    x = normal(2, 3, 96).to(device, dtype).requires_grad_()
    upstream = normal(2, 3, 70, seed=2).to(device, dtype)
    TritonHead().apply(x, prepared, spec).backward(upstream)
    expected = upstream.float() @ (tensors["weight_int8"] * tensors["weight_scale"].unsqueeze(1))
    assert x.grad is not None
    assert (x.grad.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
