"""Which experts of a checkpoint a layer of vLLM computes, and what an engine is refused because of them."""

from types import SimpleNamespace
from typing import Any

import pytest
from bwla_kernels.errors import FormatError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.expert_checks import experts_of
from bwla_kernels.format.schema import BWLAFormat
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.models.utils import WeightsMapper

from bwla_vllm.checks import check_tensor_parallel
from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError
from bwla_vllm.loading import check_expert_parallel, check_experts_adapters, check_experts_class
from bwla_vllm.moe.select import experts_spec

GATE, DOWN = LayerSpec(128, 64, 1, 8, 8, rank=2), LayerSpec(64, 128, 2, 8, 8, planes=2)
WANTED = ExpertsSpec(3, LayerSpec(256, 64, 1, 8, 8, rank=2), DOWN)
STEM = "model.layers.1.mlp.experts"


def make_format(**changes: Any) -> BWLAFormat:
    settings: dict[str, Any] = {
        "rotation": {"experts.*.gate_proj": (1, 8, 8), "experts.*.down_proj": (2, 8, 8)},
        "rank": {"experts.*.gate_proj": 2},
        "planes": {"experts.*.down_proj": 2},
        "format_version": 2,
        "experts": {"input_transform": "first"},
    }
    return BWLAFormat(**{**settings, **changes})


def make_layer(tp_size: int = 1, activation: MoEActivation = MoEActivation.SILU) -> Any:
    moe = SimpleNamespace(
        activation=activation,
        num_logical_experts=3,
        hidden_dim=64,
        intermediate_size_per_partition=128 // tp_size,
        moe_parallel_config=SimpleNamespace(tp_size=tp_size),
    )
    return SimpleNamespace(moe_config=moe)


def stored_under(stem: str, leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Any:
    specs = zip(leaves, (GATE, GATE, DOWN), strict=True)
    named = dict(specs)
    return {f"{stem}.{number}.{leaf}": spec for number in range(3) for leaf, spec in named.items()}


@pytest.mark.parametrize("prefix", [STEM, f"{STEM}.routed_experts"])
@pytest.mark.parametrize("leaves", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_by_the_headers(prefix: str, leaves: tuple[str, str, str]) -> None:
    stored = experts_of({**stored_under(STEM, leaves), "model.layers.1.self_attn.q_proj": GATE})
    assert experts_spec(make_format(), stored, prefix, make_layer()) == WANTED
    assert experts_spec(make_format(), stored, "model.layers.2.mlp.experts", make_layer()) is None


@pytest.mark.parametrize("tp_size", [1, 2])
def test_by_config_json_where_the_headers_are_unknown(tp_size: int) -> None:
    layer = make_layer(tp_size)
    assert experts_spec(make_format(), None, STEM, layer) == WANTED
    assert experts_spec(make_format(ignore=["layers.1.mlp"]), None, STEM, layer) is None
    assert experts_spec(make_format(experts=None), None, STEM, layer) is None


def test_a_module_that_vllm_calls_differently() -> None:
    stored = experts_of(stored_under("model.layers.1.block_sparse_moe.experts"))
    assert experts_spec(make_format(), stored, STEM, make_layer()) == WANTED
    assert experts_spec(make_format(), stored, "model.layers.11.mlp.experts", make_layer()) is None
    ignored = make_format(ignore=["mlp.experts"])
    assert experts_spec(ignored, stored, STEM, make_layer()) is None
    two = {**stored, **experts_of(stored_under("model.layers.1.vision.experts"))}
    with pytest.raises(
        FormatError, match=r"model.layers.1.mlp.experts: expected .* found .*block_sparse_moe.*vision"
    ):
        experts_spec(make_format(), two, STEM, make_layer())


def test_what_no_kernel_computes_is_refused() -> None:
    stored = experts_of(stored_under(STEM))
    with pytest.raises(
        FormatError, match=r"1.mlp.experts: expected an activation among silu.*found 'swiglustep'"
    ):
        experts_spec(make_format(), stored, STEM, make_layer(activation=MoEActivation.SWIGLUSTEP))
    gelu = experts_spec(make_format(), stored, STEM, make_layer(activation=MoEActivation.GELU))
    assert gelu is not None
    assert gelu.activation == "gelu"
    others = experts_of(stored_under(STEM, ("fc1", "fc3", "fc2")))
    with pytest.raises(
        FormatError, match=r"experts.0: expected the one-bit linears gate_proj.*found fc1, fc3, fc2"
    ):
        experts_spec(make_format(), others, STEM, make_layer())


def test_settings_with_a_star_survive_the_names_of_vllm() -> None:
    full = "model.layers.1.mlp.experts.*.down_proj"
    config = BWLAConfig(make_format(planes={full: 2, "experts.*.down_proj": 1}))
    config.apply_vllm_mapper(
        WeightsMapper(
            orig_to_new_prefix={"model.": "language_model.model."}, orig_to_new_substr={"mlp": "ffn"}
        )
    )
    settings = config.known_format()
    for name in ("model.layers.1.mlp", "language_model.model.layers.1.ffn"):
        spec = settings.layer_spec(f"{name}.experts.7.down_proj", 64, 128)
        assert spec is not None
        assert spec.planes == 2
    other = settings.layer_spec("language_model.model.layers.2.ffn.experts.7.down_proj", 64, 128)
    assert other is not None
    assert other.planes == 1


def test_rules_for_stacked_tensors_leave_the_names_of_experts_alone() -> None:
    """vLLM's class of gpt-oss renames what ends in `down_proj`."""
    config = BWLAConfig(make_format())
    config.specs = {**stored_under(STEM), "model.layers.1.self_attn.q_proj": DOWN}
    config.apply_vllm_mapper(
        WeightsMapper(
            orig_to_new_suffix={".down_proj": ".w2_weight", ".q_proj": ".query"},
            orig_to_new_substr={"mlp": "ffn"},
        )
    )
    other = stored_under("model.layers.1.ffn.experts")
    attention = {f"model.layers.1.self_attn.{leaf}": DOWN for leaf in ("q_proj", "query")}
    assert config.specs == {**stored_under(STEM), **other, **attention}


def test_a_description_alone_gives_the_biases_of_the_model() -> None:
    """Where no headers were read, as with `--load-format dummy`."""
    layer = make_layer(activation=MoEActivation.SWIGLUOAI)
    layer.moe_config.has_bias = True
    spec = experts_spec(make_format(), None, STEM, layer)
    assert spec is not None
    assert spec.activation == "swigluoai"
    assert (spec.gate_up.bias, spec.down.bias) == (True, True)


@pytest.mark.parametrize("leaves", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_tensor_parallel_sizes_must_divide_experts(leaves: tuple[str, str, str]) -> None:
    specs = stored_under(STEM, leaves)
    check_tensor_parallel(specs, 2)
    check_tensor_parallel(specs, 3, expert_parallel=True)
    with pytest.raises(
        FormatError, match=rf"experts.0.{leaves[0]}: expected a tensor-parallel size .* 128 rows"
    ):
        check_tensor_parallel(specs, 3)
    with pytest.raises(FormatError, match=rf"experts.0.{leaves[2]}: expected .* its 2 rotation groups"):
        check_tensor_parallel(specs, 4)
    # Outside experts, w1 and w2 say nothing about how vLLM shards them.
    check_tensor_parallel({"model.layers.0.mlp.w2": DOWN}, 4)


def test_options_of_expert_parallelism_that_cannot_work() -> None:
    check_expert_parallel(SimpleNamespace(enable_ep_weight_filter=False, enable_eplb=False))
    with pytest.raises(StartError, match=r"--enable-ep-weight-filter: expected every rank to read expert 0"):
        check_expert_parallel(SimpleNamespace(enable_ep_weight_filter=True, enable_eplb=False))
    with pytest.raises(StartError, match=r"--enable-eplb: expected one-bit experts to stay on their rank"):
        check_expert_parallel(SimpleNamespace(enable_ep_weight_filter=False, enable_eplb=True))


def test_a_class_that_cannot_load_them_is_named() -> None:
    check_experts_class(SimpleNamespace(architectures=["Qwen3MoeForCausalLM"]))
    check_experts_class(SimpleNamespace(architectures=None))
    with pytest.raises(
        StartError, match=r"vLLM's class GraniteMoeHybridForCausalLM loads only .* --ignore experts"
    ):
        check_experts_class(SimpleNamespace(architectures=["GraniteMoeHybridForCausalLM"]))


def test_adapters_leave_experts_alone() -> None:
    check_experts_adapters(None)
    check_experts_adapters(SimpleNamespace(target_modules=["q_proj", "o_proj"]))
    for targets in (None, ["q_proj", "experts"]):
        with pytest.raises(
            StartError, match=r"--enable-lora: expected adapters that leave .* --lora-target-modules"
        ):
            check_experts_adapters(SimpleNamespace(target_modules=targets))
