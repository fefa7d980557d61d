"""`BWLAConfig`: which layer gets which method, and one sentence for every wrong config."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.schema import BWLAFormat, head_args
from torch import nn

from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError
from bwla_vllm.vocabulary.head import VocabularyWatch

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


GATE_UP = {"gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize(
    ("stored", "packed", "layer", "parts"),
    [
        # GLM-4: the class says two parts, and the files hold one.
        (["gate_up_proj"], GATE_UP, "gate_up_proj", ["gate_up_proj"]),
        (["gate_proj", "up_proj"], GATE_UP, "gate_up_proj", ["gate_proj", "up_proj"]),
        # StableLM: the class does not say what it fuses.
        (["q_proj", "k_proj", "v_proj"], {}, "qkv_proj", ["q_proj", "k_proj", "v_proj"]),
        (["gate_proj", "up_proj"], {}, "gate_up_proj", ["gate_proj", "up_proj"]),
        (["w1", "w3"], {}, "gate_up_proj", ["w1", "w3"]),
        (["qkv_proj"], {}, "qkv_proj", ["qkv_proj"]),
        (["in_proj_qkv", "in_proj_z"], {}, "in_proj_qkvz", ["in_proj_qkv", "in_proj_z"]),
        (["gate_proj"], {}, "qkv_proj", []),
    ],
)
@pytest.mark.parametrize("by_headers", [True, False])
def test_a_fused_layer_is_what_the_checkpoint_holds(
    stored: list[str],
    packed: dict[str, list[str]],
    layer: str,
    parts: list[str],
    by_headers: bool,
    bare_layer: Callable[..., Any],
) -> None:
    stem = "model.layers.0.mlp."
    config = make_config(rotation=dict.fromkeys(stored, (1, 8, 8)))
    config.packed_modules_mapping = packed
    if by_headers:
        config.specs = {stem + name: LayerSpec(64, 64, 1, 8, 8, rank=2) for name in stored}
    method = config.get_quant_method(bare_layer("linear"), stem + layer)
    assert getattr(method, "parts", ()) == tuple(stem + part for part in parts)


def test_headers_decide_where_the_config_allows_both(bare_layer: Callable[..., Any]) -> None:
    """A shared expert may store gate_proj and up_proj where the dense layers store gate_up_proj."""
    config = make_config(rotation=dict.fromkeys(["gate_proj", "up_proj", "gate_up_proj"], (1, 8, 8)))
    config.packed_modules_mapping = GATE_UP
    stem = "model.layers.0.mlp."
    config.specs = {stem + "gate_up_proj": LayerSpec(64, 64, 1, 8, 8, rank=2)}
    assert config.get_quant_method(bare_layer("linear"), stem + "gate_up_proj").parts == (
        stem + "gate_up_proj",
    )
    shared = config.get_quant_method(bare_layer("linear"), "model.layers.1.shared_expert.gate_up_proj")
    assert [part.rpartition(".")[2] for part in shared.parts] == ["gate_proj", "up_proj"]


def test_kv_b_proj_is_refused_by_name(bare_layer: Callable[..., Any]) -> None:
    config = make_config(rotation={**ROTATION, "kv_b_proj": (1, 8, 8)})
    with pytest.raises(
        StartError, match=r"layers.0.self_attn.kv_b_proj: expected 16 bits.*--ignore kv_b_proj"
    ):
        config.get_quant_method(bare_layer("linear"), "model.layers.0.self_attn.kv_b_proj")


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


@pytest.mark.parametrize(
    "prefix", ["model.layers.0.mlp.experts", "model.layers.0.mlp.experts.routed_experts"]
)
def test_experts_in_16_bits_are_left_to_vllm(
    prefix: str, bare_layer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bwla_vllm.compat.releases.is_moe_layer", lambda layer: True)
    rotation = {**ROTATION, "gate_proj": (1, 8, 8)}
    ignored = make_config(rotation=rotation, ignore=["experts"])
    assert ignored.get_quant_method(bare_layer("attention"), prefix) is None
    known = make_config(rotation=rotation)
    known.specs = {"model.layers.0.mlp.gate_proj": LayerSpec(64, 64, 1, 8, 8)}
    assert known.get_quant_method(bare_layer("attention"), prefix) is None
    known.specs["model.layers.1.mlp.experts.0.w2"] = LayerSpec(64, 64, 1, 8, 8)
    assert known.get_quant_method(bare_layer("attention"), prefix) is None


def test_moe_layers_of_this_vllm_are_known() -> None:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from bwla_vllm.compat.releases import is_moe_layer

    assert is_moe_layer(RoutedExperts.__new__(RoutedExperts))
    assert not is_moe_layer(nn.Linear(1, 1))


def test_names_inside_vllm_are_learned(bare_layer: Callable[..., Any]) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = make_config(ignore=["model.layers.1"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.format.ignore == ["model.layers.1", "language_model.model.layers.1"]


def test_settings_of_single_linears_are_learned(bare_layer: Callable[..., Any]) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    name = "model.layers.1.mlp.down_proj"
    changes: dict[str, Any] = {"clip": {name: 0.5}, "planes": {name: 3}, "rank": {name: 2}}
    config = make_config(rotation={name: (1, 4, 8)}, format_version=2, **changes)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    spec = config.format.layer_spec(f"language_model.{name}", 64, 32)
    assert spec is not None
    assert (spec.clip, spec.planes, spec.rank) == (0.5, 3, 2)


TOWERS = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
"""What vLLM's class for Qwen2.5-VL maps."""


def test_groups_of_single_linears_are_learned() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    name = "layers.1.mlp.down_proj"
    sizes = {f"model.language_model.{name}": 32}
    config = make_config(rotation={}, group_size=sizes, format_version=2, rank=0)
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=TOWERS))
    spec = config.format.layer_spec(f"language_model.model.{name}", 64, 32)
    assert spec is not None
    assert spec.group_width == 32


def test_ignored_towers_are_found_inside_vllm() -> None:
    """An entry of `ignore` may be exactly what a prefix of vLLM's mapper stands for."""
    from vllm.model_executor.models.utils import WeightsMapper

    config = make_config(ignore=["lm_head", "model.visual", "model.language_model.layers.1"])
    config.specs = {"model.language_model.layers.0.self_attn.q_proj": LayerSpec(64, 64, 1, 8, 8)}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=TOWERS))
    assert config.format.is_ignored("visual.blocks.0.mlp.down_proj")
    assert config.format.is_ignored("language_model.lm_head")
    assert config.format.is_ignored("language_model.model.layers.1.mlp.down_proj")
    assert not config.format.is_ignored("language_model.model.layers.0.mlp.down_proj")
    assert "language_model.model.layers.0.self_attn.q_proj" in config.specs


@pytest.fixture
def vocabulary_layer(vllm_config: None, on_rank: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A head or an embedding as a class of vLLM builds it without the quantization config."""
    from vllm.model_executor.layers import vocab_parallel_embedding as layers

    return lambda kind: getattr(layers, kind)(64, 32, params_dtype=torch.float32, prefix="model.layer")


@pytest.mark.parametrize(
    ("stored", "tied", "drops_head", "attribute", "kind", "option"),
    [
        ("lm_head", False, False, "lm_head", "ParallelLMHead", "--lm-head-bits"),
        ("embedding", True, False, "output", "ParallelLMHead", "--embedding-bits"),
        ("embedding", False, True, "embed_tokens", "VocabParallelEmbedding", "--embedding-bits"),
        ("lm_head", False, True, "lm_head", "ParallelLMHead", None),
        ("embedding", False, False, "lm_head", "ParallelLMHead", None),
        ("lm_head", False, False, "embed_tokens", "VocabParallelEmbedding", None),
        ("planes", False, False, "lm_head", "ParallelLMHead", "--lm-head-bits"),
    ],
)
def test_a_class_that_cannot_take_a_quantized_vocabulary_is_named(
    stored: str,
    tied: bool,
    drops_head: bool,
    attribute: str,
    kind: str,
    option: str | None,
    vocabulary_layer: Callable[..., Any],
) -> None:
    settings: dict[str, Any] = {stored: head_args(), "rotation": ROTATION}
    if stored == "planes":
        settings = {"planes": 2, "rotation": {**ROTATION, "lm_head": (1, 8, 8)}, "ignore": []}
    quantization = BWLAFormat(format_version=2, **settings)
    watch = VocabularyWatch(None, quantization, tied, drops_head)
    try:
        if option is None:
            setattr(nn.Module(), attribute, vocabulary_layer(kind))
            return
        with pytest.raises(
            StartError, match=rf"{attribute}: expected 16 bits, because vLLM's class Module .* {option} 16"
        ):
            setattr(nn.Module(), attribute, vocabulary_layer(kind))
    finally:
        watch.stop()
    setattr(nn.Module(), attribute, vocabulary_layer(kind))


def test_an_embedding_that_is_older_than_the_watch_is_seen(vocabulary_layer: Callable[..., Any]) -> None:
    model = nn.Module()
    model.embed_tokens = vocabulary_layer("VocabParallelEmbedding")
    watch = VocabularyWatch(
        None, BWLAFormat(format_version=2, rotation=ROTATION, embedding=head_args()), False
    )
    try:
        with pytest.raises(StartError, match="embed_tokens: expected 16 bits"):
            model.norm = nn.LayerNorm(4)
    finally:
        watch.stop()


def test_a_watch_leaves_other_models_of_the_process_alone(vocabulary_layer: Callable[..., Any]) -> None:
    """One whose model could not be loaded would refuse the next one, which may not be quantized at all."""
    watch = VocabularyWatch(object(), BWLAFormat(rotation=ROTATION, lm_head=head_args()), False)
    try:
        nn.Module().lm_head = vocabulary_layer("ParallelLMHead")
    finally:
        watch.stop()
