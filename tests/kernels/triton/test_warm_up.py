"""The warm-up at load: it compiles what requests will launch, on a few tokens, and checks each kernel before."""

import inspect

import pytest
import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton import layer, self_check, warm_up
from bwla_kernels.triton.backend import TritonBackend
from bwla_kernels.triton.warm_up import FEW_TOKENS, configs
from bwla_kernels.triton.warm_up import warm_up as run_warm_up

GPU = ((9, 0), 132)
FUSED = ["", "norm", "add+norm", "silu*mul"]
SPECS = [
    LayerSpec(48, 320, 1, 16, 20, rank=3, bias=True),
    LayerSpec(50, 512, 2, 16, 16, rank=20, bits=8),
    LayerSpec(640, 2560, 8, 16, 20, planes=3),
]
Launch = tuple[object, ...]


@pytest.fixture(autouse=True)
def _forget() -> None:
    warm_up._done.clear()
    self_check.check_input.cache_clear()
    self_check.check_matmul.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What tells one compiled kernel from another, of every launch; nothing runs."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available():
        pytest.skip("launches are recorded in the interpreter")
    found: list[Launch] = []

    def describe(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if type(value) is int:
            return value == 1, value % 16 == 0
        return None if value is None else type(value)

    def record(self, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        parameters = inspect.signature(self.fn).parameters
        given = dict(zip(parameters, arguments, strict=False)) | options
        alike = {*self.kwargs.get("do_not_specialize", ()), "grid"}
        constants = {name for name, p in parameters.items() if "constexpr" in str(p.annotation)}
        launch = [self.fn.__name__]
        for name, value in sorted(given.items()):
            fixed = name in constants or name not in parameters  # a constant, or an option like num_warps
            launch.append((name, value if fixed else None if name in alike else describe(value)))
        found.append(tuple(launch))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    return found


def norm_weight(spec: LayerSpec, fused: str) -> torch.Tensor | None:
    return torch.ones(spec.in_features, dtype=torch.float16) if "norm" in fused else None


def request(spec: LayerSpec, prepared: dict[str, torch.Tensor], m: int, fused: str) -> None:
    """Launch what a request of m tokens does."""
    if not fused:
        TritonBackend().apply(torch.zeros(m, spec.in_features, dtype=torch.float16), prepared, spec)
        return
    names = ("weight_chunks", "weight_scale", "split_counters", "left_split", "right_split", "column_scale")
    layer = [prepared[name] for name in names]
    layer += [prepared.get(name) for name in ("low_rank_a", "low_rank_b", "bias")]
    layer += [spec.out_features, spec.rotation_groups, spec.n1, spec.n2, spec.rank, spec.bits, spec.clip]
    layer += [spec.planes]
    x = torch.zeros(m, spec.in_features * (2 if fused == "silu*mul" else 1), dtype=torch.float16)
    ops, weight = torch.ops.bwla, norm_weight(spec, fused)
    if fused == "norm":
        ops.rms_norm_linear_triton(x, *layer, weight, 1e-6)
    elif fused == "add+norm":
        ops.add_rms_norm_linear_triton(x, *layer, weight, 1e-6, torch.zeros_like(x))
    else:
        ops.silu_mul_linear_triton(x, *layer)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_requests_launch_nothing_new(
    spec: LayerSpec, fused: str, make_layer, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "_fail", lambda *_: None)  # nothing ran
    prepared = TritonBackend().prepare(make_layer(spec, 1), spec)
    run_warm_up(spec, prepared, torch.float16, *GPU, fused=fused, norm_weight=norm_weight(spec, fused))
    compiled = set(launches)
    launches.clear()
    for m in (1, 2, 3, 4, 5, 7, 8, 11, 16, 17, 31, 64, 65, 100, 129, 300, 700, 1025, 3000):
        request(spec, prepared, m, fused)
        assert launches
        assert set(launches) <= compiled, m
        launches.clear()


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_checks_compile_nothing_of_their_own(
    spec: LayerSpec, fused: str, make_layer, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_check, "_fail", lambda *_: None)
    prepared = TritonBackend().prepare(make_layer(spec, 1), spec)
    checked: set[Launch] = set()
    run = warm_up.run_layer

    def run_apart(*arguments: object) -> None:
        checked.update(launches)
        launches.clear()
        run(*arguments)
        assert set(launches) <= checked
        launches.clear()

    monkeypatch.setattr(warm_up, "run_layer", run_apart)
    run_warm_up(spec, prepared, torch.float16, *GPU, fused=fused, norm_weight=norm_weight(spec, fused))
    assert checked


def test_few_tokens_whatever_the_most(
    make_layer, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up within vLLM's memory profile takes no memory from the KV cache."""
    spec = SPECS[1]
    prepared = TritonBackend().prepare(make_layer(spec, 1), spec)
    monkeypatch.setattr(self_check, "_fail", lambda *_: None)
    tokens = []
    real_prepare, real_matmul = layer.prepare_input, layer.binary_matmul

    def prepare(x: torch.Tensor, *arguments: object, **options: object) -> object:
        tokens.append((len(x), options["config"]))
        return real_prepare(x, *arguments, **options)

    def matmul(prepared_input, *arguments: object) -> torch.Tensor:
        tokens.append((len(prepared_input.scale), arguments[2]))
        return real_matmul(prepared_input, *arguments)

    monkeypatch.setattr(layer, "prepare_input", prepare)
    monkeypatch.setattr(layer, "binary_matmul", matmul)
    run_warm_up(spec, prepared, torch.float16, *GPU)
    assert max(m for m, _ in tokens) <= FEW_TOKENS
    assert {config for _, config in tokens} == {config for pair in configs(spec, *GPU) for config in pair}
    seen = len(tokens)
    run_warm_up(spec, prepared, torch.float16, *GPU)
    assert len(tokens) == seen, "once a process"


def test_a_wrong_kernel_never_serves(
    make_layer, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[0]
    prepared = TritonBackend().prepare({k: t.to(device) for k, t in make_layer(spec, 1).items()}, spec)
    real = self_check.binary_matmul
    monkeypatch.setattr(self_check, "binary_matmul", lambda *given: real(*given) * 2)
    monkeypatch.setattr(warm_up, "run_layer", lambda *_: pytest.fail("it ran unchecked"))
    for _ in range(2):  # nor after another try
        with pytest.raises(BackendError, match="computes wrong products"):
            run_warm_up(spec, prepared, torch.float32, *GPU)
