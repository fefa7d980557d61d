"""Straight-through gradients of the ops: those of the dequantized layer, for every backend, compiled and traced."""

import pytest
import torch
from bwla_kernels import gradients, head, ops, reference
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HeadSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import normal, random_layer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
REFERENCE = "reference"
GPU = "triton"
"""Backend that tests/kernels/triton covers."""

BACKENDS = [*(backend.name for backend in ops.backends() if backend.name != GPU), REFERENCE]
HEADS = [*(backend.name for backend in ops.head_backends() if backend.name != GPU), REFERENCE]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6))


def runner(spec: LayerSpec, layer: dict[str, Tensor], name: str):
    """Return x -> y by the backend of that name; skips where it cannot run here."""
    if name == REFERENCE:
        return lambda x: reference.linear(x, layer, spec)
    backend = {b.name: b for b in ops.backends()}[name]
    able, reason = backend.can_implement(spec, CPU)
    if not able:
        pytest.skip(f"{name}: {reason}")
    prepared = backend.prepare(layer, spec)
    return lambda x: backend.apply(x, prepared, spec)


def able_backends(spec: LayerSpec) -> list[str]:
    return [*(b.name for b in ops.backends() if b.can_implement(spec, CPU)[0]), REFERENCE]


def gradient_of(run, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = run(x)
    (gradient,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    return y.detach(), gradient


def dequantized(spec: LayerSpec, layer: dict[str, Tensor]):
    """Return the ordinary linear layer with the dequantized weight."""
    weight = reference.dequantize(layer, spec)
    bias = layer["bias"].float() if spec.bias else None
    return lambda x: torch.nn.functional.linear(x.float(), weight, bias)


@st.composite
def specs(draw) -> LayerSpec:
    groups, words = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    width = 32 * words
    grouped = draw(st.booleans())
    n1 = draw(st.sampled_from([order for order in range(1, width + 1) if width % order == 0]))
    n1 = 1 if grouped else n1
    return LayerSpec(
        draw(st.integers(1, 200)),
        groups * width,
        groups,
        n1,
        width // n1,
        rank=0 if grouped else draw(st.sampled_from([0, 1, 3, 5, 16])),
        bits=draw(st.sampled_from([16, 16, 2, 6, 8])),
        clip=draw(st.sampled_from([1.0, 0.85])),
        bias=draw(st.booleans()),
        planes=draw(st.integers(1, 4)),
        grouped=grouped,
    )


@settings(max_examples=60, deadline=None)
@given(
    spec=specs(),
    seed=st.integers(0, 1000),
    axes=st.sampled_from([(), (1,), (0,), (5,), (2, 3)]),
    dtype=st.sampled_from([*TOLERANCE]),
)
def test_every_backend_has_the_gradient_of_the_dequantized_layer(
    spec: LayerSpec, seed: int, axes: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = random_layer(spec, seed)
    x = normal(*axes, spec.in_features, seed=seed).to(dtype)
    upstream = normal(*axes, spec.out_features, seed=seed + 1).to(dtype)
    expected_y, expected = gradient_of(dequantized(spec, layer), x, upstream)
    for name in able_backends(spec):
        y, gradient = gradient_of(runner(spec, layer, name), x, upstream)
        assert (gradient.dtype, gradient.shape) == (dtype, x.shape)
        assert relative(gradient, expected) <= TOLERANCE[dtype], name
        if spec.bits == 16:
            assert relative(y, expected_y) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("name", ["torch", REFERENCE])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_gradient_predicts_finite_differences_without_activation_quantization(
    name: str, planes: int, rank: int
) -> None:
    """Without quantized activations the layer is linear in x, so that differences of any size are exact."""
    spec = LayerSpec(33, 192, 2, 8, 12, rank=rank, bits=16, bias=True, planes=planes)
    run = runner(spec, random_layer(spec, 2), name)
    x, direction, upstream = normal(4, 192), normal(4, 192, seed=2), normal(4, 33, seed=3)
    _, gradient = gradient_of(run, x, upstream)
    difference = ((run(x + direction) - run(x - direction)) / 2 * upstream).sum()
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_weight_of_several_slabs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "WEIGHTS_AT_ONCE", 64 * 96)
    spec = LayerSpec(200, 96, 1, 8, 12, rank=2, planes=2)
    layer = random_layer(spec, 4)
    x, upstream = normal(3, 96), normal(3, 200, seed=5)
    _, gradient = gradient_of(runner(spec, layer, name), x, upstream)
    assert relative(gradient, gradient_of(dequantized(spec, layer), x, upstream)[1]) <= 1e-5


def test_slabs_cover_all_rows_and_are_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "WEIGHTS_AT_ONCE", 1000)
    parts = gradients.row_slabs(300, 10, 64)
    assert [(part.start, part.stop) for part in parts] == [
        (0, 64),
        (64, 128),
        (128, 192),
        (192, 256),
        (256, 300),
    ]
    assert gradients.row_slabs(3, 5000) == [slice(0, 1), slice(1, 2), slice(2, 3)]


SPEC = LayerSpec(33, 192, 2, 8, 12, rank=3, bias=True, planes=2)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_accumulate_through_strided_and_expanded_tensors(name: str) -> None:
    layer = random_layer(SPEC, 6)
    run, plain = runner(SPEC, layer, name), dequantized(SPEC, layer)
    found, expected = [], []
    for function, gradients_of_it in ((run, found), (plain, expected)):
        base = normal(192, 5, seed=7).requires_grad_()
        (function(base.t()).sum() + function(base.t()[:2]).float().sum() * 3).backward()
        gradients_of_it.append(base.grad)
    assert relative(found[0], expected[0]) <= 1e-5


@pytest.mark.parametrize("name", BACKENDS[:-1])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_gradients_equal_eager_ones(name: str, dynamic: bool) -> None:
    run = runner(SPEC, random_layer(SPEC, 8), name)
    compiled = torch.compile(
        lambda x: torch.tanh(run(x * 2)), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for tokens in (4, 7):
        x, upstream = normal(tokens, 192), normal(tokens, 33, seed=9)
        y, gradient = gradient_of(compiled, x, upstream)
        eager_y, eager = gradient_of(lambda x: torch.tanh(run(x * 2)), x, upstream)
        torch.testing.assert_close(y, eager_y)
        torch.testing.assert_close(gradient, eager)


@pytest.mark.parametrize("name", BACKENDS[:-1])
def test_inference_mode_and_no_grad_keep_no_graph(name: str) -> None:
    run = runner(SPEC, random_layer(SPEC, 8), name)
    x = normal(3, 192).requires_grad_()
    recorded = run(x)
    assert recorded.requires_grad
    with torch.no_grad():
        without = run(x)
    with torch.inference_mode():
        inference = run(x)
    assert not without.requires_grad
    assert not inference.requires_grad
    assert torch.equal(without, recorded)
    assert torch.equal(inference, recorded)
    assert not run(x.detach()).requires_grad


@pytest.mark.parametrize("name", BACKENDS[:-1])
def test_fake_and_meta_tensors_suffice(name: str) -> None:
    backend = {b.name: b for b in ops.backends()}[name]
    if not backend.can_implement(SPEC, CPU)[0]:
        pytest.skip(f"{name} does not run on a CPU")
    prepared = backend.prepare(random_layer(SPEC, 8), SPEC)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {key: mode.from_tensor(tensor) for key, tensor in prepared.items()}
        x = torch.empty(2, 5, 192, dtype=torch.bfloat16, requires_grad=True)
        backend.apply(x, fakes, SPEC).sum().backward()
    assert x.grad is not None
    assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
    on_meta = {key: tensor.to("meta") for key, tensor in prepared.items()}
    x = torch.empty(2, 5, 192, device="meta", requires_grad=True)
    backend.apply(x, on_meta, SPEC).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", BACKENDS[:-1])
def test_opcheck_of_the_backward_pass(name: str) -> None:
    backend = {b.name: b for b in ops.backends()}[name]
    if not backend.can_implement(SPEC, CPU)[0]:
        pytest.skip(f"{name} does not run on a CPU")
    prepared = backend.prepare(random_layer(SPEC, 8), SPEC)
    sizes = (33, 2, 8, 12, 3, 6, 1.0, 2, False)
    layer = {
        "torch": (*(prepared.get(key) for key in TORCH_TENSORS), 6, 1.0),
        "cpu": (prepared.get("packed"), prepared["bias"], *sizes),
    }[name]
    op = getattr(torch.ops.bwla, f"linear_{name}").default
    torch.library.opcheck(op, (normal(3, 192).requires_grad_(), *layer))
    companion = getattr(torch.ops.bwla, f"linear_{name}_input_gradient").default
    torch.library.opcheck(companion, (normal(3, 33), *layer))


TORCH_TENSORS = (
    "signs", "weight_scale", "rotation_left", "rotation_right", "column_scale", "low_rank_a", "low_rank_b", "bias"
)  # fmt: skip


@pytest.mark.parametrize("key", TORCH_TENSORS[1:])
@pytest.mark.parametrize("x_too", [False, True])
def test_a_weight_that_wants_a_gradient_is_refused(key: str, x_too: bool) -> None:
    backend, _ = ops.select_backend(SPEC, CPU, "torch")
    prepared = backend.prepare(random_layer(SPEC, 8), SPEC)
    prepared[key] = prepared[key].clone().requires_grad_()
    y = backend.apply(normal(3, 192).requires_grad_(x_too), prepared, SPEC)
    with pytest.raises(BackendError, match="bwla::linear_torch: expected requires_grad for the input only"):
        y.sum().backward()


@pytest.mark.parametrize("name", BACKENDS[:-1])
def test_second_derivatives_are_refused(name: str) -> None:
    run = runner(SPEC, random_layer(SPEC, 8), name)
    x = normal(3, 192).requires_grad_()
    (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match=rf"linear_{name}_input_gradient has no gradient: only first"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bits", [6, 16])
def test_autocast_changes_neither_the_output_nor_the_gradient(name: str, bits: int) -> None:
    spec = LayerSpec(33, 192, 2, 8, 12, rank=3, bits=bits)
    if bits == 16 and name == "cpu":
        pytest.skip("the CPU kernel quantizes activations")
    run = runner(spec, random_layer(spec, 2), name)
    x, upstream = normal(4, 192), normal(4, 33, seed=3)
    expected = gradient_of(run, x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_of(run, x, upstream)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def head_runner(spec: HeadSpec, tensors: dict[str, Tensor], name: str):
    if name == REFERENCE:
        return lambda x: head.head_reference(x, **tensors)
    backend = {b.name: b for b in ops.head_backends()}[name]
    able, reason = backend.can_implement(spec, CPU)
    if not able:
        pytest.skip(f"{name}: {reason}")
    prepared = backend.prepare(tensors, spec)
    return lambda x: backend.apply(x, prepared, spec)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (33, 100), (300, 192), (5, 31)])
@pytest.mark.parametrize("axes", [(), (0,), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [*TOLERANCE])
def test_heads_have_the_gradient_of_the_dequantized_head(
    name: str, rows: int, columns: int, axes: tuple[int, ...], dtype: torch.dtype, monkeypatch
) -> None:
    monkeypatch.setattr(gradients, "WEIGHTS_AT_ONCE", 100 * 100)
    tensors = head.quantize_head(normal(rows, columns) * 0.02)
    weight = tensors["weight_int8"] * tensors["weight_scale"].unsqueeze(1)
    x, upstream = normal(*axes, columns).to(dtype), normal(*axes, rows, seed=2).to(dtype)
    _, gradient = gradient_of(head_runner(HeadSpec(rows, columns), tensors, name), x, upstream)
    assert (gradient.dtype, gradient.shape) == (dtype, x.shape)
    assert relative(gradient, upstream.float() @ weight) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", HEADS[:-1])
def test_compiled_and_fake_heads(name: str) -> None:
    tensors = head.quantize_head(normal(33, 100))
    run = head_runner(HeadSpec(33, 100), tensors, name)
    compiled = torch.compile(lambda x: run(x) + 1, fullgraph=True, backend="aot_eager")
    x, upstream = normal(3, 100), normal(3, 33, seed=2)
    torch.testing.assert_close(gradient_of(compiled, x, upstream)[1], gradient_of(run, x, upstream)[1])
    backend = {b.name: b for b in ops.head_backends()}[name]
    prepared = backend.prepare(tensors, HeadSpec(33, 100))
    op = getattr(torch.ops.bwla, f"head_{name}").default
    torch.library.opcheck(op, (x.requires_grad_(), *prepared.values()))
    prepared["weight_scale"] = prepared["weight_scale"].clone().requires_grad_()
    y = backend.apply(x, prepared, HeadSpec(33, 100))
    with pytest.raises(BackendError, match="expected requires_grad for the input only"):
        y.sum().backward()


def test_rows_of_an_8_bit_embedding_can_be_differentiated() -> None:
    """Trainers set requires_grad on them, so that checkpointed decoder layers get gradients."""
    tensors = head.quantize_head(normal(33, 100))
    rows = head.dequantize_rows(**tensors, ids=torch.tensor([1, 5]), dtype=torch.float32).requires_grad_()
    head.head_reference(rows, **tensors).sum().backward()
    weight = tensors["weight_int8"] * tensors["weight_scale"].unsqueeze(1)
    assert rows.grad is not None
    assert relative(rows.grad, weight.sum(0).expand(2, -1)) <= 1e-5
