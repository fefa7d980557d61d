"""The 8-bit head: every backend and variant equals the reference implementation up to the output's rounding."""

import pytest
import torch
from bwla_kernels import head, ops
from bwla_kernels.format.head import HeadSpec

SHAPES = [(1, 64), (33, 100), (300, 192), (70, 4160), (5, 31)]
CPU = torch.device("cpu")


def make(
    rows: int, columns: int, tokens: int, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns + tokens)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[rows // 2] = 0
    x = torch.randn(tokens, columns, generator=generator)
    if tokens > 2:
        x[1] = 0
        x[2, 0] = 1000.0
    return head.quantize_head(weight), x.to(dtype)


def able(name: str, spec: HeadSpec) -> ops.HeadBackend:
    """The backend of that name; skips where it cannot run here."""
    backend = {b.name: b for b in ops.head_backends()}[name]
    can, reason = backend.can_implement(spec, CPU)
    if not can:
        pytest.skip(f"{name}: {reason}")
    return backend


@pytest.mark.parametrize("name", [backend.name for backend in ops.head_backends()])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_equal_the_definition(name: str, rows: int, columns: int, tokens: int, dtype) -> None:
    spec = HeadSpec(rows, columns)
    backend = able(name, spec)
    tensors, x = make(rows, columns, tokens, dtype)
    y = backend.apply(x, backend.prepare(tensors, spec), spec)
    assert torch.equal(y, head.head_reference(x, **tensors))


def test_codes_saturate_and_are_exact_at_the_extremes() -> None:
    weight = torch.full((2, 4096), 127, dtype=torch.int8)
    weight[1] = -127
    scale = torch.ones(2)
    x = torch.ones(1, 4096)
    expected = torch.tensor([[127.0 * 4096, -127.0 * 4096]])
    spec = HeadSpec(2, 4096)
    for backend in (b for b in ops.head_backends() if b.can_implement(spec, CPU)[0]):
        prepared = backend.prepare({"weight_int8": weight, "weight_scale": scale}, spec)
        torch.testing.assert_close(backend.apply(x, prepared, spec), expected, rtol=1e-6, atol=0)


def test_codes_lose_at_most_half_a_step() -> None:
    tensors, x = make(300, 192, 8, torch.float32)
    weight = (tensors["weight_int8"] * tensors["weight_scale"].unsqueeze(1)).double()
    step = x.abs().amax(1, keepdim=True) / head.Q_MAX
    error = (head.head_reference(x, **tensors) - x.double() @ weight.t()).abs()
    assert bool((error <= 0.51 * step * weight.abs().sum(1) + 1e-6 * step.clamp_min(1)).all())


@pytest.mark.parametrize("name", [backend.name for backend in ops.head_backends()])
def test_backends_keep_the_rows_that_a_tied_embedding_looks_up(name: str) -> None:
    spec = HeadSpec(33, 100)
    tensors, _ = make(33, 100, 1, torch.float32)
    prepared = able(name, spec).prepare(tensors, spec)
    assert all(torch.equal(prepared[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_equal_a_lookup_in_the_dequantized_embedding(dtype: torch.dtype) -> None:
    tensors, _ = make(33, 100, 1, torch.float32)
    ids = torch.tensor([[0, 5], [32, 16]])
    table = (tensors["weight_int8"].float() * tensors["weight_scale"].unsqueeze(1)).to(dtype)
    rows = head.dequantize_rows(**tensors, ids=ids, dtype=dtype)
    assert rows.dtype == dtype
    assert torch.equal(rows, torch.nn.functional.embedding(ids, table))
    assert head.dequantize_rows(**tensors, ids=ids[:0], dtype=dtype).shape == (0, 2, 100)


@pytest.mark.parametrize("name", [backend.name for backend in ops.head_backends()])
def test_opcheck_and_compile(name: str) -> None:
    spec = HeadSpec(33, 100)
    backend = able(name, spec)
    tensors, x = make(33, 100, 3, torch.float32)
    prepared = backend.prepare(tensors, spec)
    op = getattr(torch.ops.bwla, f"head_{name}").default
    torch.library.opcheck(op, (x, *prepared.values()))
    compiled = torch.compile(
        lambda x: backend.apply(x, prepared, spec) + 1, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), backend.apply(x, prepared, spec) + 1)
