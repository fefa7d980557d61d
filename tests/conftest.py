"""Fixtures that every package's tests share: random layers in the stored format, tiny models, the converted example."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import repository  # noqa: F401
from bwla_kernels.format import LayerSpec
from paths import EXAMPLE
from random_tensors import random_layer
from torch import Tensor

LayerFactory = Callable[[LayerSpec, int], dict[str, Tensor]]

NEED_VLLM = [] if importlib.util.find_spec("vllm") else ["vllm", "robustness"]
"""Tests that import vLLM: left out where it is not installed, as on a GPU machine that runs the kernels' tests only."""

collect_ignore = NEED_VLLM


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument: a compressed file holds its time, and the tests' processes must agree on names."""
    return argname if isinstance(val, bytes) else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests whose pretrained model is not on this machine, unless it may be downloaded."""
    for mark in item.iter_markers("real_model"):
        from benchmarks.common.real_models import gguf_path

        name: str = mark.args[0]
        if not gguf_path(name).is_file() and os.environ.get("BWLA_REAL_MODELS") != "1":
            pytest.skip(
                f"{gguf_path(name)} is missing: `python -m scripts.get_real_model {name}` gets it, and "
                "BWLA_REAL_MODELS=1 lets the tests download it"
            )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report which tests were left out."""
    for name in NEED_VLLM:
        terminalreporter.write_line(f"SKIPPED tests/{name}: vLLM is not installed")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the tests a cache of their own, so that nothing of an earlier run is read; downloaded models stay."""
    from benchmarks.common.real_models import FOLDER_VARIABLE, models_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(models_folder()))
        patch.setenv("BWLA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_layer() -> LayerFactory:
    """Return `make_layer(spec, seed)`, which draws the tensors of a valid layer."""
    return random_layer


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Return `make_model("Qwen3", shards=1, dtype=..., **config)`, which writes a random model and returns its path."""
    from benchmarks.common.tiny_models import write_model

    def make(family: str = "Qwen3", name: str = "model", **options: object) -> Path:
        return write_model(tmp_path / name, family, **options)

    return make


@pytest.fixture(scope="session")
def example_bwla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert the example model once for all tests; do not change the folder."""
    from bwla_converter.options import Options
    from bwla_converter.pipeline import convert

    out = tmp_path_factory.mktemp("example") / "books-bwla"
    # Rank 1 and the 8-bit head, which the demo's defaults do not choose for so small a model.
    convert(Options(str(EXAMPLE), out, rank=1, head_bits=8, recipe="data-free"))
    return out
