"""The check at load: sound kernels pass it, and a wrong output of each kind is named."""

import dataclasses

import pytest
import torch
import triton
from bwla_kernels.errors import BackendError
from bwla_kernels.format import LayerSpec
from bwla_kernels.triton import self_check
from bwla_kernels.triton.binary_matmul import Weights
from bwla_kernels.triton.prepare_config import select_config
from bwla_kernels.triton.prepare_input import FusedInput
from bwla_kernels.triton.self_check import (
    ADD_NORM,
    NORM,
    PLAIN,
    SILU_MUL,
    check_input,
    check_matmul,
    input_spec,
    matmul_spec,
)
from bwla_kernels.triton.tuning import BINARY, INTEGER, MatmulConfig

SPEC = LayerSpec(48, 320, 1, 16, 20, rank=3)
SPECS = [
    SPEC,
    LayerSpec(50, 512, 2, 16, 16, rank=20, bits=8, clip=0.9, bias=True),
    LayerSpec(33, 96, 1, 8, 12),
]
CONFIGS = [
    MatmulConfig(BINARY, 1, 32, 2, k_warps=2),
    MatmulConfig(BINARY, 4, 32, 2, k_warps=2),
    MatmulConfig(INTEGER, 16, 64, 4),
    MatmulConfig(INTEGER, 16, 64, 4, split=2),
    MatmulConfig(BINARY, 8, 32, 2, k_warps=2, unroll=2),
]
GPU = (9, 0)
FUSED = [PLAIN, NORM, ADD_NORM, SILU_MUL]


@pytest.fixture(autouse=True)
def _forget() -> None:
    check_input.cache_clear()
    check_matmul.cache_clear()


def check_input_of(
    spec: LayerSpec, m: int, fused: str, device: torch.device, dtype: torch.dtype = torch.float16
) -> None:
    norm_dtype = dtype if fused in (NORM, ADD_NORM) else None
    config = select_config(spec, m, GPU)
    check_input(input_spec(spec), config, m, m <= 4, dtype, fused, norm_dtype, device)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sound_matmuls_pass(config: MatmulConfig, spec: LayerSpec, planes: int, device: torch.device) -> None:
    spec = dataclasses.replace(spec, planes=planes)
    bias = torch.float16 if spec.bias else None
    for dtype in (torch.float32, torch.float16):
        check_matmul(matmul_spec(spec), config, dtype, bias, device)


@pytest.mark.parametrize("m", [1, 3, 7, 1100])
@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sound_input_kernels_pass(spec: LayerSpec, fused: str, m: int, device: torch.device) -> None:
    check_input_of(spec, m, fused, device)


@pytest.mark.parametrize("fused", FUSED)
def test_float32_inputs_pass(fused: str, device: torch.device) -> None:
    check_input_of(SPEC, 2, fused, device, torch.float32)
    check_input_of(SPEC, 5, fused, device, torch.float32)


def test_the_loader_may_have_other_defaults(device: torch.device) -> None:
    """vLLM loads a model with its dtype and its GPU as torch's defaults."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            check_matmul(matmul_spec(SPEC), CONFIGS[0], torch.float32, None, device)
            for fused in FUSED:
                check_input_of(SPEC, 1, fused, device)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[3]], ids=str)
def test_a_wrong_plane_is_seen(
    config: MatmulConfig, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sign of the last plane, wherever it is repacked to."""
    real = self_check.binary_matmul

    def wrong(prepared: object, weights: Weights, *rest: object) -> torch.Tensor:
        packed = weights.packed.clone()
        packed.view(weights.layout.tiles)[0, 1, -1, 0, 0] ^= 1
        return real(prepared, dataclasses.replace(weights, packed=packed), *rest)

    monkeypatch.setattr(self_check, "binary_matmul", wrong)
    with pytest.raises(BackendError, match="computes wrong products"):
        check_matmul(matmul_spec(dataclasses.replace(SPEC, planes=3)), config, torch.float32, None, device)


@pytest.mark.parametrize("config", CONFIGS[1:], ids=str)
@pytest.mark.parametrize("bits", [0, 1])
def test_a_wrong_matmul_is_named(
    config: MatmulConfig, bits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = self_check.binary_matmul

    def wrong(*arguments: object) -> torch.Tensor:
        y = real(*arguments)
        y[-1, -1] = float("nan") if bits else y[-1, -1] + 2.0**-10
        return y

    monkeypatch.setattr(self_check, "binary_matmul", wrong)
    with pytest.raises(BackendError) as caught:
        check_matmul(matmul_spec(SPEC), config, torch.float32, None, device)
    message = str(caught.value)
    assert f"the Triton kernel {config.kernel}_mma ({config}) computes wrong products" in message
    assert f"with Triton {triton.__version__}" in message
    assert "BWLA_BACKEND=torch" in message


def test_counters_that_are_left_are_seen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = self_check.binary_matmul

    def wrong(activations, weights, *rest) -> torch.Tensor:
        y = real(activations, weights, *rest)
        weights.counters[1] = 1
        return y

    monkeypatch.setattr(self_check, "binary_matmul", wrong)
    with pytest.raises(BackendError, match="wrong counters"):
        check_matmul(matmul_spec(SPEC), CONFIGS[3], torch.float32, None, device)


def off_by_one(q: torch.Tensor) -> torch.Tensor:
    return torch.where(q > 0, q - 1, q + 1)


WRONG = {
    "scale": (lambda part: part * 1.001, "scales"),
    "q": (off_by_one, "codes (not only at rounding ties)"),
    "q_sum": (lambda part: part + 1, "sums of codes"),
    "planes": (lambda part: part ^ 1, "bit planes"),
    "u": (lambda part: part * 1.001, "low-rank inputs u"),
    "residual": (lambda part: part + 1, "sums with the residual"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("fused", FUSED)
def test_a_wrong_input_kernel_is_named(
    name: str, fused: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "residual" and fused != ADD_NORM:
        return
    change, what = WRONG[name]
    real = self_check.prepare_input

    def wrong(*arguments: object, **options: object) -> object:
        prepared = real(*arguments, **options)
        return dataclasses.replace(prepared, **{name: change(getattr(prepared, name))})

    monkeypatch.setattr(self_check, "prepare_input", wrong)
    with pytest.raises(BackendError) as caught:
        check_input_of(SPEC, 2, fused, device)
    message = str(caught.value)
    assert f"computes wrong {what} on " in message
    assert f"the Triton kernel prepare_input{f' with {fused}' if fused else ''} (" in message
    assert f"with Triton {triton.__version__}" in message
    assert "BWLA_BACKEND=torch" in message


@pytest.mark.parametrize(
    ("fused", "change"),
    [
        (NORM, {"eps": 0.0}),
        (NORM, {"norm_weight": torch.ones(320, dtype=torch.float16)}),
        (ADD_NORM, {"residual": torch.zeros(2, 320, dtype=torch.float16)}),
        (PLAIN, {"scale": 1.01}),
    ],
    ids=str,
)
def test_a_wrong_fused_load_is_seen(
    fused: str, change: dict[str, object], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that leaves out a part of what it should do before it rotates."""
    real, change = self_check.prepare_input, dict(change)
    factor = change.pop("scale", 1.0)
    change = {
        key: part.to(device) if isinstance(part, torch.Tensor) else part for key, part in change.items()
    }

    def wrong(x: torch.Tensor, *arguments: object, fused: FusedInput, **options: object) -> object:
        return real(x * factor, *arguments, fused=dataclasses.replace(fused, **change), **options)

    monkeypatch.setattr(self_check, "prepare_input", wrong)
    with pytest.raises(BackendError, match="computes wrong"):
        check_input_of(SPEC, 2, fused, device)


def test_nan_is_wrong(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    real = self_check.prepare_input

    def wrong(*arguments: object, **options: object) -> object:
        prepared = real(*arguments, **options)
        prepared.scale[-1, -1] = float("nan")
        return prepared

    monkeypatch.setattr(self_check, "prepare_input", wrong)
    with pytest.raises(BackendError, match="wrong scales"):
        check_input_of(SPEC, 1, PLAIN, device)


def test_a_kernel_that_does_not_compile_is_one_sentence(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise triton.OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(self_check, "prepare_input", fails)
    monkeypatch.setattr(self_check, "binary_matmul", fails)
    with pytest.raises(
        BackendError, match=r"binary_mma \(.*\) cannot run on .*shared memory.*BWLA_BACKEND=torch"
    ):
        check_matmul(matmul_spec(SPEC), CONFIGS[0], torch.float32, None, device)
    with pytest.raises(BackendError, match="prepare_input .* cannot run on"):
        check_input_of(SPEC, 1, PLAIN, device)


def test_each_is_checked_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that differ in what a check does not look at share it."""
    check_matmul(matmul_spec(SPEC), CONFIGS[0], torch.float32, None, device)
    monkeypatch.setattr(self_check, "binary_matmul", None)
    other = dataclasses.replace(SPEC, out_features=96, clip=0.5)
    check_matmul(matmul_spec(other), CONFIGS[0], torch.float32, None, device)
    assert matmul_spec(dataclasses.replace(SPEC, planes=2)) != matmul_spec(SPEC)
    assert input_spec(dataclasses.replace(SPEC, planes=2)) == input_spec(SPEC)
