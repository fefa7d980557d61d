"""Linears with scales for groups of columns in vLLM's layer that shards its input: dtypes and shapes of the scales."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.schema import BWLAFormat, activation_args
from random_tensors import normal, random_layer
from torch import Tensor

from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError

SPEC = LayerSpec(64, 256, 4, 1, 64, bits=8, planes=2, grouped=True)

pytestmark = pytest.mark.usefixtures("vllm_config", "on_rank")


@pytest.fixture
def stored() -> dict[str, Tensor]:
    return random_layer(SPEC, 3)


def build() -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    quantization = BWLAFormat(
        format_version=2, planes=2, group_size={"down_proj": 64}, input_activations=activation_args(8)
    )
    return RowParallelLinear(
        256, 64, bias=False, quant_config=BWLAConfig(quantization), prefix="layers.0.down_proj"
    )


def load(layer: Any, stored: dict[str, Tensor]) -> Any:
    for key, tensor in stored.items():
        parameter = getattr(layer, key)
        parameter.weight_loader(parameter, tensor)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_values(dtype: torch.dtype, stored: dict[str, Tensor]) -> None:
    stored["weight_scale"] = stored["weight_scale"].to(dtype)
    layer = load(build(), stored)
    assert torch.equal(layer.weight_scale.data, stored["weight_scale"].float())
    layer.quant_method.process_weights_after_loading(layer)
    y, _ = layer(normal(5, 256))
    torch.testing.assert_close(y, reference.linear(normal(5, 256), stored, SPEC))


def test_a_scale_of_zero_is_valid(stored: dict[str, Tensor]) -> None:
    stored["weight_scale"][3, 1] = 0
    layer = load(build(), stored)
    layer.quant_method.process_weights_after_loading(layer)
    y, _ = layer(normal(5, 256))
    torch.testing.assert_close(y, reference.linear(normal(5, 256), stored, SPEC))


def test_a_negative_scale_is_named(stored: dict[str, Tensor]) -> None:
    stored["weight_scale"][3, 1, 2] = -0.5
    layer = load(build(), stored)
    with pytest.raises(
        StartError, match=r"down_proj.weight_scale: expected scales that are not negative, found -0.5"
    ):
        layer.quant_method.process_weights_after_loading(layer)


def twice_as_wide(scale: Tensor) -> Tensor:
    return torch.cat([scale, scale], 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (twice_as_wide, r"expected shape \[64, 2, 4\], found \[64, 2, 8\]"),
        (Tensor.double, "expected dtype float16 or bfloat16 or float32, found float64"),
    ],
)
def test_foreign_scales_are_refused(
    change: Callable[[Tensor], Tensor],
    sentence: str,
    stored: dict[str, Tensor],
    on_rank: Callable[[int, int], None],
) -> None:
    on_rank(1, 2)
    stored["weight_scale"] = change(stored["weight_scale"])
    with pytest.raises(StartError, match=rf"down_proj.weight_scale: {sentence}"):
        load(build(), stored)
