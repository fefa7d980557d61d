"""The ops: equal to the reference, registered correctly, and seen through by torch.compile."""

import pytest
import torch
from bwla_kernels import ops, reference
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec

SPECS = [
    LayerSpec(48, 64, 1, 8, 8),
    LayerSpec(33, 192, 2, 8, 12, rank=3, bias=True),
    LayerSpec(40, 512, 8, 8, 8, rank=1, bits=8, clip=0.9),
    LayerSpec(20, 352, 1, 16, 22, bits=16, rank=2),
    LayerSpec(70, 192, 2, 8, 12, rank=3, bias=True, planes=3),
    LayerSpec(20, 352, 1, 16, 22, bits=16, rank=2, planes=2),
    LayerSpec(40, 512, 4, 1, 128, bits=8, grouped=True),
    LayerSpec(70, 192, 2, 1, 96, bias=True, planes=2, grouped=True),
    LayerSpec(20, 96, 3, 1, 32, bits=16, planes=2, grouped=True),
]
BACKENDS = [backend.name for backend in ops.backends()]
CPU = torch.device("cpu")


def build(spec: LayerSpec, make_layer, name: str):
    able, reason = {b.name: b for b in ops.backends()}[name].can_implement(spec, CPU)
    if not able:
        pytest.skip(f"{name}: {reason}")
    backend, _ = ops.select_backend(spec, CPU, name)
    layer = make_layer(spec, 11)
    return backend, layer, backend.prepare(layer, spec)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.out_features}x{s.in_features}b{s.bits}p{s.planes}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_backend_agrees_with_the_reference(
    spec: LayerSpec, make_layer, name: str, dtype, tokens: int
) -> None:
    backend, layer, prepared = build(spec, make_layer, name)
    x = torch.randn(tokens, spec.in_features, generator=torch.Generator().manual_seed(12)).to(dtype)
    y, expected = backend.apply(x, prepared, spec), reference.linear(x, layer, spec)
    assert y.dtype == dtype
    # A sum in another order may move one code at a rounding boundary; bound the whole, not each element.
    tolerance = {torch.float32: 2e-3, torch.bfloat16: 1e-2, torch.float16: 3e-3}[dtype]
    assert y.shape == expected.shape
    assert (y.float() - expected.float()).norm() <= tolerance * max(expected.float().norm().item(), 1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_leading_axes_are_kept(make_layer, name: str) -> None:
    spec = SPECS[1]
    backend, layer, prepared = build(spec, make_layer, name)
    x = torch.randn(2, 3, spec.in_features, generator=torch.Generator().manual_seed(13))
    torch.testing.assert_close(
        backend.apply(x, prepared, spec), reference.linear(x, layer, spec), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_torch_compile_sees_no_graph_break(make_layer, name: str) -> None:
    spec = SPECS[1]
    backend, _, prepared = build(spec, make_layer, name)
    compiled = torch.compile(
        lambda x: backend.apply(x, prepared, spec) * 2, fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(4, spec.in_features, generator=torch.Generator().manual_seed(14))
    torch.testing.assert_close(compiled(x), backend.apply(x, prepared, spec) * 2)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[4]], ids=["plain", "full", "planes"])
def test_opcheck_of_the_torch_op(spec: LayerSpec, make_layer) -> None:
    _, _, prepared = build(spec, make_layer, "torch")
    x = torch.randn(3, spec.in_features)
    names = ("signs", "weight_scale", "rotation_left", "rotation_right", "column_scale")
    optional = (prepared.get("low_rank_a"), prepared.get("low_rank_b"), prepared.get("bias"))
    torch.library.opcheck(
        torch.ops.bwla.linear_torch.default,
        (x, *(prepared[name] for name in names), *optional, spec.bits, spec.clip),
    )


def test_prepare_mutates_nothing(make_layer) -> None:
    layer = make_layer(SPECS[1], 15)
    before = {name: tensor.clone() for name, tensor in layer.items()}
    for backend in ops.backends():
        if backend.can_implement(SPECS[1], CPU)[0]:
            backend.prepare(layer, SPECS[1])
    assert all(torch.equal(layer[name], before[name]) for name in before)


def test_an_unknown_backend_is_named_with_the_choices() -> None:
    with pytest.raises(BackendError, match=r"'nope' does not exist: choose one of .*torch"):
        ops.select_backend(SPECS[0], CPU, "nope")


def test_the_last_backend_runs_anything() -> None:
    assert ops.backends()[-1].can_implement(SPECS[3], CPU)[0]
