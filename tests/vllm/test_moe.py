"""One-bit experts in vLLM: loaded by vLLM's own layer, on one rank and on two, and what is refused."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.experts.spec import expert_tensors
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import INPUT_TRANSFORM
from experts_cases import Case, random_case
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from bwla_vllm.errors import StartError
from bwla_vllm.moe.method import BWLAExpertsMethod
from bwla_vllm.observe import Observer

pytestmark = pytest.mark.usefixtures("vllm_config")

NAME = "model.layers.0.mlp.experts"
SPEC = ExpertsSpec(6, LayerSpec(256, 64, 1, 8, 8, rank=2), LayerSpec(64, 128, 2, 8, 8, rank=1, planes=2))
BIASED = replace(
    SPEC,
    gate_up=replace(SPEC.gate_up, bias=True),
    down=replace(SPEC.down, bias=True),
    activation="swigluoai",
)
"""As those of gpt-oss."""

GPT_OSS = {"activation": MoEActivation.SWIGLUOAI, "has_bias": True}
TOP_K = 3

Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Rank:
    """A rank among two: of tensor parallelism, or of expert parallelism."""

    rank: int = 0
    tensor: int = 1
    expert: int = 1


def make_layer(
    rank: Rank = Rank(),
    spec: ExpertsSpec = SPEC,
    observer: Observer | None = None,
    stored_spec: ExpertsSpec | None = None,
    **changes: Any,
) -> Any:
    """vLLM's layer of routed experts of the sizes of `spec`, as its model classes build it, with our method."""
    experts_parallel = rank.expert > 1
    parallel = FusedMoEParallelConfig(
        tp_size=rank.tensor,
        pcp_size=1,
        dp_size=1,
        ep_size=rank.expert,
        tp_rank=rank.rank if rank.tensor > 1 else 0,
        pcp_rank=0,
        dp_rank=0,
        ep_rank=rank.rank if experts_parallel else 0,
        sp_size=1,
        use_ep=experts_parallel,
        all2all_backend="",
        enable_eplb=False,
    )
    config = FusedMoEConfig(
        num_experts=spec.experts,
        experts_per_token=TOP_K,
        hidden_dim=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_local_experts=spec.experts // rank.expert,
        num_logical_experts=spec.experts,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.float32,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    manager = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=TOP_K,
        global_num_experts=spec.experts,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    quantization = SimpleNamespace(
        get_quant_method=lambda layer, prefix: BWLAExpertsMethod(
            config, stored_spec or SPEC, prefix, None, observer or Observer()
        ),
        online_quantization_config=None,
    )
    return RoutedExperts(NAME, torch.float32, config, quantization, manager)


def stored(case: Case) -> Stored:
    """The tensors of a checkpoint by their names below the layer; expert 0 has the input transform."""
    inner, tensors = case.spec.intermediate_size, {}
    for expert in range(case.spec.experts):
        gate_up, down = expert_tensors(case.gate_up, expert), expert_tensors(case.down, expert)
        for name in gate_up:
            for i, leaf in enumerate(("gate_proj", "up_proj")):
                whole = name in INPUT_TRANSFORM
                if expert == 0 or not whole:
                    rows = gate_up[name] if whole else gate_up[name][i * inner : (i + 1) * inner]
                    tensors[f"{expert}.{leaf}.{name}"] = rows
        for name, tensor in down.items():
            if expert == 0 or name not in INPUT_TRANSFORM:
                tensors[f"{expert}.down_proj.{name}"] = tensor
    return tensors


def load(layer: Any, tensors: Stored) -> Any:
    """Load as vLLM's model classes do, and finish."""
    list(layer.load_weights(tensors.items()))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def apply(layer: Any, case: Case) -> Tensor:
    result: Tensor = layer.forward_modular(case.x, case.weights, case.ids)
    return result


@pytest.fixture(scope="module")
def case() -> Case:
    return random_case(SPEC, 9, TOP_K)


def assert_close(y: Tensor, want: Tensor) -> None:
    """A sum in another order may move a code at a rounding boundary by one."""
    assert (y - want).norm() <= 2e-3 * want.norm()


def test_vllms_layer_loads_and_computes_them(case: Case) -> None:
    layer = load(make_layer(), stored(case))
    assert_close(apply(layer, case), case.reference())
    assert {name for name, _ in layer.named_parameters()} == set(layer.bwla_tensors)


def test_two_tensor_parallel_ranks_add_up(case: Case) -> None:
    parts = [apply(load(make_layer(Rank(i, tensor=2)), stored(case)), case) for i in range(2)]
    assert_close(parts[0] + parts[1], case.reference())
    assert (parts[0] - case.reference()).norm() > 0.1 * case.reference().norm()


def test_two_expert_parallel_ranks_add_up(case: Case) -> None:
    """The second rank has no expert that stores the input transform, and gets it all the same."""
    layers = [load(make_layer(Rank(i, expert=2)), stored(case)) for i in range(2)]
    assert [layer.bwla.spec.experts for layer in layers] == [3, 3]
    assert_close(apply(layers[0], case) + apply(layers[1], case), case.reference())


@pytest.mark.parametrize("rank", [Rank(), Rank(tensor=2), Rank(expert=2)], ids=["one", "tensor", "expert"])
def test_biases_and_the_activation_of_gpt_oss(rank: Rank) -> None:
    """With tensor parallelism, one rank alone adds the bias of down."""
    biased = random_case(BIASED, 9, TOP_K)
    ranks = [replace(rank, rank=i) for i in range(max(rank.tensor, rank.expert))]
    layers = [load(make_layer(one, stored_spec=BIASED, **GPT_OSS), stored(biased)) for one in ranks]
    assert_close(torch.stack([apply(layer, biased) for layer in layers]).sum(0), biased.reference())


def test_the_limits_of_a_config() -> None:
    """vLLM's other name of the activation takes its limits from the model's config."""
    other = replace(BIASED, limit=0.5, alpha=2.0)
    case = random_case(other, 9, TOP_K)
    options = {"swiglu_limit": 0.5, "swiglu_alpha": 2.0, "swiglu_beta": 1.0, "has_bias": True}
    activation = MoEActivation.SWIGLUOAI_UNINTERLEAVE
    layer = load(make_layer(stored_spec=other, activation=activation, **options), stored(case))
    assert_close(apply(layer, case), case.reference())
    with pytest.raises(StartError, match="expected activation swigluoai, found swigluoai_uninterleave"):
        make_layer(stored_spec=other, activation=activation, **{**options, "swiglu_beta": 0.5})


def test_missing_tensors_are_named_with_their_expert(case: Case) -> None:
    tensors = stored(case)
    for name, found in (
        ("4.up_proj.weight_scale", r"experts.4.w3.weight_scale: not found in the checkpoint"),
        ("2.down_proj.weight_packed", r"experts.2.w2.weight_packed: not found in the checkpoint"),
        ("5.gate_proj.low_rank_b", r"experts.5.w1.low_rank_b: not found in the checkpoint"),
    ):
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        with pytest.raises(StartError, match=found):
            load(make_layer(), rest)
    biased = stored(random_case(BIASED, 1, TOP_K))
    del biased["3.up_proj.bias"]
    with pytest.raises(StartError, match=r"experts.3.w3.bias: not found in the checkpoint"):
        load(make_layer(stored_spec=BIASED, **GPT_OSS), biased)
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotation_left")}
    with pytest.raises(StartError, match=r"experts.0.w1.rotation_left: not found"):
        load(make_layer(), rest)
    rest = {name: tensor for name, tensor in tensors.items() if name != "4.up_proj.weight_scale"}
    with pytest.raises(StartError, match=r"experts.4.w3.weight_scale: not found"):
        load(make_layer(Rank(1, expert=2)), rest)


Change = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        (
            "1.gate_proj.weight_packed",
            lambda t: t[1:],
            r"experts.1.w1.weight_packed: expected shape \[128, 2\]",
        ),
        (
            "1.down_proj.weight_scale",
            lambda t: t.float(),
            r"experts.1.w2.weight_scale: expected dtype bfloat16",
        ),
        (
            "0.up_proj.column_scale",
            lambda t: t * 2,
            r"experts.0.w3.column_scale: expected the values of w1, which reads the same input",
        ),
        ("3.up_proj.weight_scale", lambda t: -t, r"experts.w13.weight_scale: expected positive scales"),
    ],
)
def test_wrong_tensors_are_refused(case: Case, name: str, change: Change, found: str) -> None:
    tensors = stored(case)
    tensors[name] = change(tensors[name])
    with pytest.raises(StartError, match=found):
        load(make_layer(), tensors)


def test_another_expert_with_an_input_transform_is_refused(case: Case) -> None:
    tensors = stored(case)
    tensors["3.up_proj.column_scale"] = tensors["0.up_proj.column_scale"]
    with pytest.raises(
        StartError, match=r"experts.3.w3.column_scale: expected the input transform with expert 0 only"
    ):
        load(make_layer(), tensors)


@pytest.mark.parametrize("rank", [Rank(), Rank(1, expert=2), Rank(1, tensor=2)])
def test_reloaded_weights_are_complete(case: Case, rank: Rank) -> None:
    """vLLM counts what is loaded again, and repacks the layer once it has as many numbers as there are."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    layer = make_layer(rank)
    record_metadata_for_reloading(layer)
    load(layer, stored(case))
    wanted = apply(layer, case)
    for parameter in layer.parameters():
        parameter.data.zero_()
    initialize_layerwise_reload(layer)
    list(layer.load_weights(stored(case).items()))
    finalize_layerwise_reload(layer, None)
    assert {name for name, _ in layer.named_parameters()} == set(layer.bwla_tensors)
    assert torch.equal(apply(layer, case), wanted)


def test_dummy_weights_are_valid_experts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bwla_vllm.moe.method.note_backend", lambda name: True)
    layer = make_layer()
    layer.quant_method.process_weights_after_loading(layer)
    y = apply(layer, case)
    assert bool(torch.isfinite(y).all())
    assert y.norm() > 0
    assert not layer.bwla.dummy


def test_the_table_and_the_comparison_know_them(
    case: Case, plugin_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin_log.set_level("INFO", "vllm.bwla")
    observer = Observer(calls=1)
    layer = load(make_layer(observer=observer), stored(case))
    table = plugin_log.text
    assert "6 x (256 x 64 + 64 x 128)" in table
    assert "W1A6 rank 2/1" in table
    assert_close(apply(layer, case), case.reference())
    assert "call 1 of 1, 1 groups of experts, 9 rows: worst model.layers.0.mlp.experts" in plugin_log.text
    assert "differ from the reference" not in plugin_log.text
    wrong = load(make_layer(observer=Observer(calls=1)), stored(case))
    backend = wrong.bwla.backend.backend
    monkeypatch.setattr(type(backend), "apply", lambda self, x, *rest: -x)
    apply(wrong, case)
    assert "differ from the reference implementation: model.layers.0.mlp.experts" in plugin_log.text


def test_what_no_kernel_computes_is_refused() -> None:
    with pytest.raises(StartError, match="needs biases of gate and up, but the checkpoint has none"):
        make_layer(has_bias=True)
    with pytest.raises(StartError, match="has no bias of gate and up, but the checkpoint has one"):
        make_layer(stored_spec=BIASED, activation=MoEActivation.SWIGLUOAI)
    with pytest.raises(
        StartError, match="do not support swiglu_limit; convert the model again with --ignore"
    ):
        make_layer(swiglu_limit=7.0)
    with pytest.raises(StartError, match="do not support swiglu_limit"):
        make_layer(stored_spec=BIASED, activation=MoEActivation.SWIGLUOAI, has_bias=True, swiglu_limit=5.0)
    with pytest.raises(StartError, match="expected activation silu, found gelu_tanh"):
        make_layer(activation=MoEActivation.GELU_TANH)
    other = replace(SPEC, gate_up=replace(SPEC.gate_up, out_features=512), down=LayerSpec(64, 256, 2, 8, 16))
    with pytest.raises(StartError, match="expected experts of 64 and 128 values, found 64 and 256"):
        make_layer(spec=other)
    with pytest.raises(StartError, match="w2"):
        make_layer(Rank(0, tensor=4))
