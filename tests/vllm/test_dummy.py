"""Stand-in weights of `--load-format dummy`: valid layers, made in place of vLLM's noise."""

from types import SimpleNamespace

import pytest
import torch
from bwla_kernels.format import LayerSpec, validate_layer

from bwla_vllm.dummy import dummy_tensors, loads_dummy_weights


@pytest.mark.parametrize(
    "spec", [LayerSpec(40, 64, 1, 8, 8), LayerSpec(33, 192, 2, 8, 12, rank=3, bias=True)]
)
def test_dummy_tensors_are_a_valid_layer(spec: LayerSpec) -> None:
    tensors = dummy_tensors(spec, torch.device("cpu"))
    validate_layer("layer", tensors, spec)
    again = dummy_tensors(spec, torch.device("cpu"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_dummy_load_format_is_told_from_others() -> None:
    def config(load_format: str) -> SimpleNamespace:
        return SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))

    assert loads_dummy_weights(config("dummy"))
    assert not loads_dummy_weights(config("auto"))
    assert not loads_dummy_weights(None)
