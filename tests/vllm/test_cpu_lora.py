"""Rows without an adapter in vLLM's LoRA operations for CPUs."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.ops.torch_ops import lora_ops

from bwla_vllm.compat import cpu_lora
from bwla_vllm.compat.releases import CPU_LORA_OPERATIONS

ADAPTERS = torch.tensor([1, -1, 0])
WITH_LORA = SimpleNamespace(lora_config=object())


@pytest.fixture(autouse=True)
def own_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test vLLM's operations as they are installed, and put back what was there before."""
    for module in (lora_ops, cpu_lora.punica_cpu):
        for name in CPU_LORA_OPERATIONS:
            operation = getattr(module, name)
            monkeypatch.setattr(module, name, getattr(operation, "__wrapped__", operation))


def test_a_row_without_an_adapter_gets_nothing_of_any() -> None:
    weights, inputs = torch.ones(2, 4, 3), torch.ones(3, 3)
    assert cpu_lora.skip_rows_without_adapter(WITH_LORA, "0.32.0")
    output = torch.full((3, 4), 7.0)
    lora_ops.bgmv_shrink(inputs, weights, output, ADAPTERS, 2.0)
    assert output.tolist() == [[6.0] * 4, [0.0] * 4, [6.0] * 4]
    output = torch.full((3, 4), 7.0)
    lora_ops.bgmv_expand(inputs, weights, output, ADAPTERS, add_inputs=True)
    assert output.tolist() == [[10.0] * 4, [7.0] * 4, [10.0] * 4]
    output = torch.full((3, 6), 7.0)
    lora_ops.bgmv_expand_slice(inputs, weights, output, ADAPTERS, 2, 4, add_inputs=True)
    assert output.tolist() == [[7.0] * 2 + [10.0] * 4, [7.0] * 6, [7.0] * 2 + [10.0] * 4]


def test_all_who_call_the_operations_get_the_same_ones_once() -> None:
    assert cpu_lora.skip_rows_without_adapter(WITH_LORA, "0.32.0")
    first = [getattr(lora_ops, name) for name in CPU_LORA_OPERATIONS]
    assert cpu_lora.skip_rows_without_adapter(WITH_LORA, "0.32.0")
    assert [getattr(lora_ops, name) for name in CPU_LORA_OPERATIONS] == first
    caller = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu")
    assert all(hasattr(getattr(caller, name), "__wrapped__") for name in CPU_LORA_OPERATIONS)


@pytest.mark.parametrize(
    ("config", "release"),
    [(SimpleNamespace(lora_config=None), "0.32.0"), (WITH_LORA, "0.33.0"), (WITH_LORA, "dev")],
)
def test_the_operations_stay_where_nothing_is_wrong(config: SimpleNamespace, release: str) -> None:
    assert not cpu_lora.skip_rows_without_adapter(config, release)
    assert not any(hasattr(getattr(lora_ops, name), "__wrapped__") for name in CPU_LORA_OPERATIONS)
