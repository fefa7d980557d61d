"""`BWLAConfig`: which layer gets which method, and one sentence for every wrong config."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bwla_kernels.format.schema import BWLAFormat
from torch import nn

from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError

ROTATION = {"q_proj": (1, 8, 8), "k_proj": (1, 8, 8), "v_proj": (1, 8, 8), "down_proj": (2, 8, 8)}
QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.fixture
def bare_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A layer of a vLLM class that skips the class's constructor, on a rank of a made-up size."""
    import vllm.distributed
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    classes = {
        "linear": LinearBase,
        "head": ParallelLMHead,
        "embedding": VocabParallelEmbedding,
        "attention": Attention,
    }
    monkeypatch.setattr(vllm.distributed, "get_tensor_model_parallel_world_size", lambda: 2)

    def make(kind: str, input_size: int = 64) -> Any:
        layer = classes[kind].__new__(classes[kind])
        nn.Module.__init__(layer)
        layer.input_size = input_size
        return layer

    return make


def make_config(**changes: Any) -> BWLAConfig:
    config = BWLAConfig(BWLAFormat(**{"rotation": ROTATION, "rank": 2, **changes}))
    config.packed_modules_mapping = QKV
    return config


def test_facts_that_vllm_asks_for() -> None:
    config = make_config()
    assert config.get_name() == "bwla"
    assert set(config.get_supported_act_dtypes()) == {torch.bfloat16, torch.float16, torch.float32}
    assert config.get_min_capability() == 80
    assert config.get_config_filenames() == []
    assert BWLAConfig.override_quantization_method({}, None, hf_config=None, invented_later=1) is None


def test_config_travels_to_the_engine_process() -> None:
    config = make_config()
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert copied.format == config.format


def test_stored_config_is_read_back() -> None:
    config = make_config(clip={"down_proj": 0.5})
    assert BWLAConfig.from_config(config.format.to_json()).format == config.format


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 3}, "expected format_version 1 or 2, found 3: install the bwla release"),
        ({"format_version": None}, "expected format_version 1 or 2, found None"),
        ({"quant_method": "gptq"}, "expected quant_method 'bwla', found 'gptq'"),
        ({"colour": "blue"}, "colour: Extra inputs are not permitted"),
        ({"rotation": None}, "rotation: Input should be a valid dictionary"),
        ({"rotation": {"q_proj": [1, 0, 8]}}, "rotation sizes must be positive"),
        ({"rank": "many"}, "rank"),
        ({"lm_head": {"num_bits": 4, "strategy": "channel"}}, "lm_head must be 8-bit"),
    ],
)
def test_wrong_config_is_one_sentence(change: Any, sentence: str) -> None:
    data = {**make_config().format.to_json(), **change}
    with pytest.raises(StartError) as caught:
        BWLAConfig.from_config(data)
    assert str(caught.value).startswith("config.json: quantization_config")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_model_that_is_no_checkpoint_is_explained(bare_layer: Callable[..., Any]) -> None:
    config = BWLAConfig()
    for question in (
        lambda: config.maybe_update_config("some/model", hf_config=None, revision=None),
        lambda: config.get_quant_method(bare_layer("linear"), "model.layers.0.self_attn.qkv_proj"),
    ):
        with pytest.raises(StartError, match=r"needs a BWLA checkpoint.*bwla-convert MODEL OUT"):
            question()


def test_unknown_backend_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_BACKEND", "abacus")
    config = make_config()
    monkeypatch.delenv("BWLA_BACKEND")  # read once, when the config is made
    with pytest.raises(StartError, match=r"BWLA_BACKEND: expected one of .*torch.*, found 'abacus'"):
        config.maybe_update_config("some/model")


@pytest.mark.parametrize(
    ("kind", "name", "method"),
    [
        ("linear", "model.layers.0.self_attn.qkv_proj", "BWLALinearMethod"),
        ("linear", "model.layers.0.mlp.down_proj", "BWLALinearMethod"),
        ("linear", "model.layers.0.mlp.gate", "UnquantizedLinearMethod"),
        ("linear", "model.layers.1.self_attn.qkv_proj", "UnquantizedLinearMethod"),
        ("head", "lm_head", "NoneType"),
        ("embedding", "model.embed_tokens", "NoneType"),  # tests/vllm/test_embedding.py has the 8-bit one
        ("attention", "model.layers.0.self_attn.attn", "NoneType"),
    ],
)
def test_each_layer_gets_its_method(
    kind: str, name: str, method: str, bare_layer: Callable[..., Any]
) -> None:
    config = make_config(ignore=["lm_head", "re:model[.]layers[.]1[.].*"])
    layer = bare_layer(kind, 128 if name.endswith("down_proj") else 64)
    assert type(config.get_quant_method(layer, name)).__name__ == method


def test_fused_layer_knows_its_parts(bare_layer: Callable[..., Any]) -> None:
    method = make_config().get_quant_method(bare_layer("linear"), "model.layers.0.self_attn.qkv_proj")
    stem = "model.layers.0.self_attn."
    assert method.parts == (stem + "q_proj", stem + "k_proj", stem + "v_proj")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"ignore": ["k_proj"]}, "k_proj: not quantized"),
        ({"rank": {"q_proj": 1}}, "k_proj: rotation (1, 8, 8), planes 1, rank 0"),
        ({"rotation": {**ROTATION, "v_proj": (1, 4, 16)}}, "v_proj: rotation (1, 4, 16)"),
        ({"clip": {"q_proj": 0.5}}, "q_proj: rotation (1, 8, 8), planes 1, rank 2, clip 0.5"),
    ],
)
def test_fused_parts_must_be_quantized_alike(
    changes: dict[str, Any], found: str, bare_layer: Callable[..., Any]
) -> None:
    with pytest.raises(StartError) as caught:
        make_config(**changes).get_quant_method(bare_layer("linear"), "model.layers.0.self_attn.qkv_proj")
    message = str(caught.value)
    assert message.startswith(
        "model.layers.0.self_attn.qkv_proj: vLLM computes q_proj, k_proj, v_proj as one"
    )
    assert found in message


def test_rotation_that_does_not_fit_names_the_layer(bare_layer: Callable[..., Any]) -> None:
    with pytest.raises(StartError, match=r"layers.0.mlp.down_proj: rotation \(2, 8, 8\) covers 128 columns"):
        make_config().get_quant_method(bare_layer("linear", 96), "model.layers.0.mlp.down_proj")


def test_one_bit_head_is_refused(bare_layer: Callable[..., Any]) -> None:
    config = make_config(rotation={**ROTATION, "lm_head": (1, 8, 8)}, ignore=[])
    with pytest.raises(StartError, match=r"lm_head: this release .* --ignore lm_head"):
        config.get_quant_method(bare_layer("head"), "lm_head")


def test_one_bit_experts_are_refused(bare_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bwla_vllm.compat.is_moe_layer", lambda layer: True)
    config = make_config(rotation={**ROTATION, "gate_proj": (1, 8, 8)})
    with pytest.raises(StartError, match=r"mlp.experts.0.gate_proj: this release .* --ignore gate_proj"):
        config.get_quant_method(bare_layer("attention"), "model.layers.0.mlp.experts")


def test_moe_layers_of_this_vllm_are_known() -> None:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from bwla_vllm.compat import is_moe_layer

    assert is_moe_layer(RoutedExperts.__new__(RoutedExperts))
    assert not is_moe_layer(nn.Linear(1, 1))


def test_names_inside_vllm_are_learned(bare_layer: Callable[..., Any]) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = make_config(ignore=["model.layers.1"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.format.ignore == ["model.layers.1", "language_model.model.layers.1"]
