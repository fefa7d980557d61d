"""When vLLM's ahead-of-time compilation is disabled, so that a restart finds what was compiled."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationMode

from bwla_vllm.compat import compile_cache
from bwla_vllm.compat.compile_cache import VARIABLE, reuse_compiled_graphs
from bwla_vllm.compat.releases import NEWEST


def config(mode: CompilationMode = CompilationMode.DYNAMO_TRACE_ONCE) -> Any:
    return SimpleNamespace(compilation_config=SimpleNamespace(mode=mode))


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without the variable, and restore what the process had."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)


def test_it_is_disabled_once_where_vllm_compiles_for_a_cpu() -> None:
    assert reuse_compiled_graphs(config(), NEWEST)
    assert os.environ[VARIABLE] == "0"
    assert not reuse_compiled_graphs(config(), NEWEST)


@pytest.mark.parametrize("value", ["0", "1"])
def test_what_the_user_says_is_kept(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert not reuse_compiled_graphs(config(), NEWEST)
    assert os.environ[VARIABLE] == value


@pytest.mark.parametrize("mode", [CompilationMode.NONE, CompilationMode.VLLM_COMPILE])
def test_other_modes_are_left_alone(mode: CompilationMode) -> None:
    assert not reuse_compiled_graphs(config(mode), NEWEST)
    assert VARIABLE not in os.environ


def test_untested_releases_and_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not reuse_compiled_graphs(config(), "1.0")
    monkeypatch.setattr(compile_cache, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert not reuse_compiled_graphs(config(), NEWEST)
    assert VARIABLE not in os.environ


def test_vllm_reads_the_variable_when_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    monkeypatch.setenv(VARIABLE, "0")
    assert not envs.VLLM_USE_AOT_COMPILE
