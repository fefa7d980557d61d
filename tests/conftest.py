"""Fixtures that every package's tests share: random layers in the stored format, tiny models, the converted example."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import repository  # noqa: F401
import torch
from bwla_kernels.format import LayerSpec, pack_signs, to_storage_dtype
from paths import EXAMPLE
from torch import Tensor

LayerFactory = Callable[[LayerSpec, int], dict[str, Tensor]]

NEED_VLLM = [] if importlib.util.find_spec("vllm") else ["vllm", "robustness"]
"""What cannot even be imported where vLLM is not installed (a GPU machine that only runs the kernels' tests)."""

collect_ignore = NEED_VLLM


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say it where tests were left out."""
    for name in NEED_VLLM:
        terminalreporter.write_line(f"SKIPPED tests/{name}: vLLM is not installed")


def _random_rotation(blocks: int, order: int, generator: torch.Generator) -> Tensor:
    square = torch.randn(blocks, order, order, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q


def random_layer(spec: LayerSpec, seed: int = 0) -> dict[str, Tensor]:
    """A valid layer of random contents, in the stored dtypes."""
    generator = torch.Generator().manual_seed(seed)
    n, k, r = spec.out_features, spec.in_features, spec.rank
    tensors = {
        "weight_packed": pack_signs(torch.randint(0, 2, (n, k), generator=generator)),
        "weight_scale": torch.rand(n, generator=generator) / k**0.5 + 0.01,
        "rotation_left": _random_rotation(spec.rotation_groups, spec.n1, generator),
        "rotation_right": _random_rotation(spec.rotation_groups, spec.n2, generator),
        "column_scale": torch.rand(k, generator=generator) + 0.5,
    }
    if r:
        tensors["low_rank_a"] = torch.randn(r, k, generator=generator) / k**0.5
        tensors["low_rank_b"] = torch.randn(n, r, generator=generator)
    if spec.bias:
        tensors["bias"] = torch.randn(n, generator=generator)
    return to_storage_dtype(tensors, spec)


@pytest.fixture(scope="session")
def make_layer() -> LayerFactory:
    """`make_layer(spec, seed)` -> the tensors of a random valid layer."""
    return random_layer


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """`make_model("Qwen3", shards=1, dtype=..., **config)` -> folder of a random model."""
    from benchmarks.common.tiny_models import write_model

    def make(family: str = "Qwen3", name: str = "model", **options: object) -> Path:
        return write_model(tmp_path / name, family, **options)

    return make


@pytest.fixture(scope="session")
def example_bwla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model, converted once for all tests; leave it as it is."""
    from bwla_converter.options import Options
    from bwla_converter.pipeline import convert

    out = tmp_path_factory.mktemp("example") / "books-bwla"
    # Rank 1 and the 8-bit head, which the demo (the defaults on so small a model) does not have.
    convert(Options(str(EXAMPLE), out, rank=1, head_bits=8))
    return out
