"""A head in binary planes in vLLM: shards of the vocabulary, what is not loaded, and whole engines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.schema import BWLAFormat, activation_args
from torch import Tensor

from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError

VOCABULARY, HIDDEN, PADDED = 250, 64, 256
"""vLLM pads the vocabulary to a multiple of 64."""

SPEC = LayerSpec(VOCABULARY, HIDDEN, 1, 8, 8, rank=2, bits=16, planes=3)
GROUPED = LayerSpec(VOCABULARY, HIDDEN, 2, 1, 32, bits=16, grouped=True)
ROTATION = {"lm_head": (1, 8, 8)}


@pytest.fixture
def stored(make_layer: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    return make_layer(SPEC, 0)


@pytest.fixture
def config() -> BWLAConfig:
    quantization = BWLAFormat(
        format_version=2,
        rotation=ROTATION,
        planes=3,
        rank=2,
        ignore=[],
        input_activations=activation_args(16),
    )
    return BWLAConfig(quantization)


def make_head(config: BWLAConfig, bias: bool = False, prefix: str = "lm_head") -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return ParallelLMHead(
        VOCABULARY, HIDDEN, bias=bias, params_dtype=torch.float32, quant_config=config, prefix=prefix
    )


def load(layer: Any, stored: dict[str, Tensor]) -> Any:
    for name, tensor in stored.items():
        parameter = layer.get_parameter(name)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.usefixtures("vllm_config")
def test_shards_of_the_vocabulary(
    size: int,
    config: BWLAConfig,
    stored: dict[str, Tensor],
    on_rank: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The logits of all ranks, one after the other, are the reference's; those of padded rows are zero."""
    import vllm.model_executor.layers.vocab_parallel_embedding as layers

    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    logits = []
    for rank in range(size):
        on_rank(rank, size)
        monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        layer = load(make_head(config), stored)
        logits.append(layer.quant_method.apply(layer, x))
    joined = torch.cat(logits, 1)
    assert joined.shape == (3, PADDED)
    assert not joined[:, VOCABULARY:].any()
    torch.testing.assert_close(
        joined[:, :VOCABULARY], reference.linear(x, stored, SPEC), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.usefixtures("vllm_config")
def test_shards_of_a_head_with_scales_for_groups(
    size: int,
    make_layer: Callable[..., dict[str, Tensor]],
    on_rank: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm.model_executor.layers.vocab_parallel_embedding as layers

    quantization = BWLAFormat(
        format_version=2, group_size={"lm_head": 32}, ignore=[], input_activations=activation_args(16)
    )
    x, stored = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)), make_layer(GROUPED, 0)
    logits = []
    for rank in range(size):
        on_rank(rank, size)
        monkeypatch.setattr(layers, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        layer = load(make_head(BWLAConfig(quantization)), stored)
        logits.append(layer.quant_method.apply(layer, x))
    joined = torch.cat(logits, 1)
    assert not joined[:, VOCABULARY:].any()
    torch.testing.assert_close(
        joined[:, :VOCABULARY], reference.linear(x, stored, GROUPED), rtol=1e-4, atol=1e-4
    )


@pytest.mark.usefixtures("vllm_config", "on_rank")
def test_the_bias_is_added(config: BWLAConfig, stored: dict[str, Tensor]) -> None:
    layer = make_head(config, bias=True)
    assert layer.bias.shape == (PADDED,)
    load(layer, stored)
    x, bias = torch.ones(1, HIDDEN), torch.arange(float(PADDED))
    plain = layer.quant_method.apply(layer, x)
    assert torch.equal(layer.quant_method.apply(layer, x, bias), plain + bias)


@pytest.mark.usefixtures("vllm_config", "on_rank")
@pytest.mark.parametrize("prefix", ["", "language_model.lm_head"])
def test_the_head_may_have_another_name_in_vllm(prefix: str, config: BWLAConfig) -> None:
    """K-EXAONE's class gives it none."""
    assert type(make_head(config, prefix=prefix).quant_method).__name__ == "BWLAPlanesHeadMethod"


@pytest.mark.usefixtures("vllm_config", "on_rank")
@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale", "rotation_left", "low_rank_a"])
def test_a_tensor_that_was_not_loaded_is_named(
    missing: str, config: BWLAConfig, stored: dict[str, Tensor]
) -> None:
    del stored[missing]
    with pytest.raises(StartError, match=rf"lm_head.{missing}: not found in the checkpoint"):
        load(make_head(config), stored)


@pytest.mark.usefixtures("vllm_config", "on_rank")
def test_invalid_values_are_named(config: BWLAConfig, stored: dict[str, Tensor]) -> None:
    stored["weight_scale"][3] = float("inf")
    with pytest.raises(StartError, match=r"lm_head.weight_scale: expected"):
        load(make_head(config), stored)


@pytest.mark.parametrize("compiled", [False, True])
def test_vllm_answers_as_the_reference_does(
    compiled: bool,
    make_checkpoint: Callable[..., Any],
    tmp_path: Path,
    start: Callable[..., Any],
    compare: Callable[..., None],
) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    made = make_checkpoint(
        tmp_path / "model", rotation=ROTATION, ignore=(), planes={**dict.fromkeys(kinds, 1), "lm_head": 3}
    )
    assert made.specs["lm_head"].planes == 3
    compare(start(made.folder, enforce_eager=not compiled), made.golden())


def test_dummy_weights(
    make_checkpoint: Callable[..., Any], tmp_path: Path, start: Callable[..., Any]
) -> None:
    from vllm import SamplingParams

    made = make_checkpoint(tmp_path / "model", rotation=ROTATION, ignore=(), planes=2)
    engine = start(made.folder, load_format="dummy")
    options = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    (found,) = engine.generate({"prompt_token_ids": [1, 2, 3]}, options, use_tqdm=False)
    assert len(found.outputs[0].token_ids) == 2
