"""Linears that the checkpoint stores as one tensor and vLLM as several parts (Phi-3's qkv_proj and gate_up_proj)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.schema import BWLAFormat, activation_args
from torch import Tensor

from bwla_vllm.checks import check_tensor_parallel
from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError

pytestmark = pytest.mark.usefixtures("vllm_config", "on_rank")

HIDDEN, INNER, HEAD, HEADS, KV_HEADS = 64, 96, 32, 4, 2
ROWS = {"qkv_proj": [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD], "gate_up_proj": [INNER, INNER]}


@pytest.fixture
def config() -> BWLAConfig:
    rotation = dict.fromkeys(ROWS, (1, 8, 8))
    result = BWLAConfig(BWLAFormat(input_activations=activation_args(6), rank=2, rotation=rotation))
    result.packed_modules_mapping = {name: [name] for name in ROWS}
    return result


def build(config: BWLAConfig, kind: str) -> Any:
    import vllm.model_executor.layers.linear as linear

    common = {"bias": False, "quant_config": config, "prefix": f"layers.0.{kind}"}
    if kind == "qkv_proj":
        return linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **common)
    return linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **common)


def load(layer: Any, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        parameter = getattr(layer, key)
        parameter.weight_loader(parameter, tensor)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ROWS)
def test_over_ranks(
    kind: str,
    size: int,
    config: BWLAConfig,
    make_layer: Callable[..., Any],
    on_rank: Callable[[int, int], None],
) -> None:
    """Each rank takes its rows of every part; with 4 ranks and 2 key heads, two ranks hold the same key head."""
    spec = config.format.layer_spec(kind, sum(ROWS[kind]), HIDDEN)
    tensors = make_layer(spec, 3)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    wanted = reference.linear(x, tensors, spec).split(ROWS[kind], dim=1)
    for rank in range(size):
        on_rank(rank, size)
        layer = build(config, kind)
        load(layer, tensors)
        layer.quant_method.process_weights_after_loading(layer)
        y, _ = layer(x)
        widths = [max(rows // size, HEAD if kind == "qkv_proj" else 0) for rows in ROWS[kind]]
        for whole, piece, width in zip(wanted, y.split(widths, dim=1), widths, strict=True):
            share = rank * (whole.shape[1] // width) // size
            torch.testing.assert_close(piece, whole[:, share * width : (share + 1) * width])


@pytest.mark.parametrize("key", ["weight_packed", "weight_scale", "low_rank_b"])
@pytest.mark.parametrize("kind", ROWS)
def test_another_length_is_refused(
    kind: str, key: str, config: BWLAConfig, make_layer: Callable[..., Any]
) -> None:
    """vLLM would take the beginning of a longer one."""
    rows = sum(ROWS[kind])
    tensors = make_layer(config.format.layer_spec(kind, rows + 32, HIDDEN), 3)
    with pytest.raises(
        StartError, match=rf"layers.0.{kind}.{key}: expected shape \[{rows}.*found \[{rows + 32}"
    ):
        load(build(config, kind), {key: tensors[key]})


def test_a_part_that_is_missing_names_the_stored_tensor(
    config: BWLAConfig, make_layer: Callable[..., Any]
) -> None:
    tensors = make_layer(config.format.layer_spec("qkv_proj", sum(ROWS["qkv_proj"]), HIDDEN), 3)
    del tensors["rotation_left"]
    layer = build(config, "qkv_proj")
    load(layer, tensors)
    with pytest.raises(StartError, match=r"layers.0.qkv_proj.rotation_left: not found in the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)


def test_ranks_must_divide_the_rows_of_each_part() -> None:
    specs = {"layers.0.mlp.gate_up_proj": LayerSpec(2 * 30, 64, 1, 8, 8)}
    check_tensor_parallel(specs, 2)
    with pytest.raises(FormatError, match="size that divides its 30 rows, found 4"):
        check_tensor_parallel(specs, 4)
