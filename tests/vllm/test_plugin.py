"""The entry point: vLLM finds it, it costs nothing, and it cannot end vLLM."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import bwla_vllm


def test_vllm_finds_the_entry_point() -> None:
    (found,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "bwla"]
    assert found.load() is bwla_vllm.register


def test_importing_the_plugin_imports_no_vllm() -> None:
    code = "import sys, bwla_vllm; sys.exit('vllm' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_register_may_repeat() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from bwla_vllm.config import BWLAConfig

    bwla_vllm.register()
    bwla_vllm.register()
    assert get_quantization_config("bwla") is BWLAConfig
    assert QUANTIZATION_METHODS.count("bwla") == 1


def test_register_logs_instead_of_raising(
    monkeypatch: pytest.MonkeyPatch, plugin_log: pytest.LogCaptureFixture
) -> None:
    import vllm.model_executor.layers.quantization as quantization

    def broken(name: str) -> None:
        raise OSError("moved")

    monkeypatch.setattr(quantization, "register_quantization_config", broken)
    bwla_vllm.register()
    assert "could not be registered" in plugin_log.text
    assert "moved" in plugin_log.text
