"""`BWLALinearMethod` and its parameters, in vLLM's own layer classes, on made-up tensor-parallel ranks.

Constructors, weight loaders and narrowing are vLLM's, so all ranks together must equal the reference implementation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bwla_kernels import reference
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import INPUT_TRANSFORM
from bwla_kernels.format.schema import BWLAFormat, activation_args
from torch import Tensor

from bwla_vllm.config import BWLAConfig
from bwla_vllm.errors import StartError

Stored = dict[str, dict[str, Tensor]]
OnRank = Callable[[int, int], None]

pytestmark = pytest.mark.usefixtures("vllm_config", "on_rank")

HIDDEN, INNER, HEAD, HEADS, KV_HEADS = 64, 256, 32, 4, 2
QKV_ROWS = {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD}
ROTATION = {
    **dict.fromkeys((*QKV_ROWS, "gate_proj", "up_proj", "c_proj"), (1, 8, 8)),
    "down_proj": (4, 8, 8),
}
MAPPING = {"qkv_proj": [*QKV_ROWS], "gate_up_proj": ["gate_proj", "up_proj"]}


GROUPS = {**dict.fromkeys(ROTATION, 32), "down_proj": 64}
FORMS: dict[str, dict[str, Any]] = {
    "one plane": {"rank": 2, "rotation": ROTATION},
    "three planes": {"rank": 2, "rotation": ROTATION, "format_version": 2, "planes": 3},
    "groups of columns": {"format_version": 2, "planes": 2, "group_size": GROUPS},
}
transformed = pytest.mark.parametrize("config", ["one plane", "three planes"], indirect=True)


@pytest.fixture(params=FORMS)
def config(request: pytest.FixtureRequest) -> BWLAConfig:
    result = BWLAConfig(BWLAFormat(input_activations=activation_args(6), **FORMS[request.param]))
    result.packed_modules_mapping = MAPPING
    return result


@pytest.fixture
def stored(config: BWLAConfig, make_layer: Callable[..., Any]) -> Stored:
    """What the checkpoint holds for each linear; groups share their input transform."""
    sizes = {
        **{name: (rows, HIDDEN) for name, rows in QKV_ROWS.items()},
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "c_proj": (48, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    layers = {
        name: make_layer(spec_of(config, name, *size), seed)
        for seed, (name, size) in enumerate(sizes.items())
    }
    for group in MAPPING.values():
        shared = {key: tensor for key, tensor in layers[group[0]].items() if key in INPUT_TRANSFORM}
        for name in group[1:]:
            layers[name] |= shared
    return layers


def spec_of(config: BWLAConfig, name: str, rows: int, width: int) -> LayerSpec:
    spec = config.format.layer_spec(name, rows, width)
    assert spec is not None
    return spec


def build(config: BWLAConfig, kind: str, **options: Any) -> Any:
    """One layer of a decoder block on the current rank."""
    import vllm.model_executor.layers.linear as linear

    common = {"bias": False, "quant_config": config, "prefix": f"layers.0.{kind}", **options}
    if kind == "qkv_proj":
        return linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, **common)
    if kind == "gate_up_proj":
        return linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], **common)
    if kind == "down_proj":
        return linear.RowParallelLinear(INNER, HIDDEN, **common)
    classes = {"column": linear.ColumnParallelLinear, "replicated": linear.ReplicatedLinear}
    return classes[kind](HIDDEN, 48, **{**common, "prefix": "layers.0.c_proj"})


SHARDS = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": [0, 1], "down_proj": [None]}


def load(layer: Any, kind: str, stored: Stored, skip: tuple[str, ...] = ()) -> None:
    """Feed a layer as vLLM's model classes do: one tensor and shard id at a time."""
    names = MAPPING.get(kind, [kind if kind in stored else "c_proj"])
    for shard, name in zip(SHARDS.get(kind, [None]), names, strict=True):
        for key, tensor in stored[name].items():
            if f"{name}.{key}" in skip:
                continue
            parameter = getattr(layer, key)
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, tensor, *arguments)


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def expected(x: Tensor, config: BWLAConfig, stored: Stored, name: str) -> Tensor:
    rows = stored[name]["weight_scale"].shape[0]
    return reference.linear(x, stored[name], spec_of(config, name, rows, x.shape[-1]))


def tokens(width: int) -> Tensor:
    return torch.randn(5, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_attention_inputs_over_ranks(size: int, config: BWLAConfig, stored: Stored, on_rank: OnRank) -> None:
    """With 4 ranks and 2 key heads, two ranks hold the same key head."""
    x = tokens(HIDDEN)
    rows = {name: QKV_ROWS[name] // size for name in QKV_ROWS}
    rows.update(dict.fromkeys(("k_proj", "v_proj"), max(HEAD, rows["k_proj"])))
    parts: dict[str, list[Tensor]] = {name: [] for name in QKV_ROWS}
    for rank in range(size):
        on_rank(rank, size)
        layer = build(config, "qkv_proj")
        load(layer, "qkv_proj", stored)
        y, _ = finish(layer)(x)
        for name, piece in zip(QKV_ROWS, y.split(list(rows.values()), dim=1), strict=True):
            parts[name].append(piece)
    for name, pieces in parts.items():
        copies = len(pieces) * rows[name] // QKV_ROWS[name]
        torch.testing.assert_close(torch.cat(pieces[::copies], 1), expected(x, config, stored, name))
        torch.testing.assert_close(torch.cat(pieces[copies - 1 :: copies], 1), torch.cat(pieces[::copies], 1))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_mlp_inputs_over_ranks(size: int, config: BWLAConfig, stored: Stored, on_rank: OnRank) -> None:
    x, halves = tokens(HIDDEN), []
    for rank in range(size):
        on_rank(rank, size)
        layer = build(config, "gate_up_proj")
        load(layer, "gate_up_proj", stored)
        y, _ = finish(layer)(x)
        halves.append(y.chunk(2, dim=1))
    for name, pieces in zip(MAPPING["gate_up_proj"], zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(pieces, 1), expected(x, config, stored, name))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_input_sharded_layer_over_ranks(
    size: int, config: BWLAConfig, stored: Stored, on_rank: OnRank
) -> None:
    """Each rank rotates and scales whole rotation groups, so the sum of the ranks is the unsharded layer."""
    x, total = tokens(INNER), torch.zeros(5, HIDDEN)
    for rank, piece in enumerate(x.chunk(size, dim=1)):
        on_rank(rank, size)
        layer = build(config, "down_proj", reduce_results=False)
        load(layer, "down_proj", stored)
        total += finish(layer)(piece)[0]
    torch.testing.assert_close(total, expected(x, config, stored, "down_proj"))


@pytest.mark.parametrize(
    ("kind", "size"), [("column", 1), ("column", 2), ("replicated", 1), ("replicated", 2)]
)
def test_single_layers(kind: str, size: int, config: BWLAConfig, stored: Stored, on_rank: OnRank) -> None:
    x, pieces = tokens(HIDDEN), []
    for rank in range(size):
        on_rank(rank, size)
        layer = build(config, kind)
        load(layer, kind, stored)
        pieces.append(finish(layer)(x)[0])
    whole = expected(x, config, stored, "c_proj")
    if kind == "replicated":
        for piece in pieces:
            torch.testing.assert_close(piece, whole)
    else:
        torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_layer_stored_fused(config: BWLAConfig, stored: Stored, make_layer: Callable[..., Any]) -> None:
    """A checkpoint of one fused linear (Phi-3 stores qkv so) fills every slot from one copy."""
    config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    config.format = config.format.model_copy(update={"rotation": {"qkv_proj": (1, 8, 8)}})
    rows = sum(QKV_ROWS.values())
    tensors = make_layer(spec_of(config, "qkv_proj", rows, HIDDEN), 0)
    layer = build(config, "qkv_proj")
    for key, tensor in tensors.items():
        getattr(layer, key).weight_loader(getattr(layer, key), tensor)
    x = tokens(HIDDEN)
    torch.testing.assert_close(finish(layer)(x)[0], expected(x, config, {"qkv_proj": tensors}, "qkv_proj"))


def test_bias_is_added_where_vllm_says(config: BWLAConfig, stored: Stored) -> None:
    x, bias = tokens(INNER), torch.arange(HIDDEN, dtype=torch.float32)
    plain = expected(x, config, stored, "down_proj")
    for options, wanted in (({}, plain + bias), ({"skip_bias_add": True}, plain)):
        layer = build(config, "down_proj", bias=True, **options)
        layer.bias.data.copy_(bias)
        load(layer, "down_proj", stored)
        y, returned = finish(layer)(x)
        torch.testing.assert_close(y, wanted)
        assert (returned is None) == (not options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype, config: BWLAConfig, stored: Stored) -> None:
    layer = build(config, "down_proj", params_dtype=dtype)
    load(layer, "down_proj", stored)
    x = tokens(INNER).to(dtype)
    y, _ = finish(layer)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected(x, config, stored, "down_proj"))


@transformed
def test_everything_that_is_used_is_registered_and_nothing_else_is_kept(
    config: BWLAConfig, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "backend", "torch")  # it keeps the stored tensors apart
    layer = build(config, "qkv_proj")
    load(layer, "qkv_proj", stored)
    before = set(dict(layer.named_parameters()))
    finish(layer)
    after = dict(layer.named_parameters())
    assert set(after) == set(layer.bwla_tensors)
    assert "weight_packed" in before - set(after)
    assert after["rotation_left"].shape == (1, 8, 8)  # three copies became one
    assert after["rotation_left"].untyped_storage().nbytes() == 4 * 64
    # vLLM's LoRA wrappers find the layer's device by this name; it takes no memory and is not saved.
    assert (layer.weight_packed.shape, layer.weight_packed.device) == ((0,), after["rotation_left"].device)
    assert "weight_packed" not in layer.state_dict()
    finish(layer)  # a second call changes nothing
    assert dict(layer.named_parameters()) == after


@transformed
@pytest.mark.parametrize(
    "key", ["weight_packed", "weight_scale", "rotation_right", "low_rank_a", "low_rank_b"]
)
def test_tensor_that_was_never_loaded_is_named(key: str, config: BWLAConfig, stored: Stored) -> None:
    layer = build(config, "qkv_proj")
    load(layer, "qkv_proj", stored, skip=(f"k_proj.{key}",))
    with pytest.raises(StartError, match=rf"layers.0.k_proj.{key}: not found in the checkpoint"):
        finish(layer)


@transformed
@pytest.mark.parametrize("key", ["rotation_left", "column_scale", "low_rank_a"])
def test_copies_of_a_group_must_be_equal(key: str, config: BWLAConfig, stored: Stored) -> None:
    stored["v_proj"][key] = stored["v_proj"][key].flip(-1).clone()
    layer = build(config, "qkv_proj")
    load(layer, "qkv_proj", stored)
    with pytest.raises(StartError, match=rf"qkv_proj.{key}: expected identical copies in .*q_proj.*v_proj"):
        finish(layer)


@transformed
def test_invalid_values_are_refused(config: BWLAConfig, stored: Stored) -> None:
    stored["down_proj"]["rotation_left"] = stored["down_proj"]["rotation_left"] * 2
    layer = build(config, "down_proj")
    load(layer, "down_proj", stored)
    with pytest.raises(StartError, match=r"layers.0.down_proj.rotation_left: expected an orthogonal matrix"):
        finish(layer)


def longer(tensor: Tensor, dim: int) -> Tensor:
    return torch.cat([tensor, tensor], dim)


@pytest.mark.parametrize("config", ["one plane"], indirect=True)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "name", "key", "change", "sentence"),
    [
        (
            "qkv_proj",
            "k_proj",
            "weight_packed",
            Tensor.float,
            r"\(part k\): expected dtype int32, found float32",
        ),
        (
            "qkv_proj",
            "k_proj",
            "weight_packed",
            lambda t: longer(t, 0),
            r"expected shape \[64, 2\], found \[128, 2\]",
        ),
        (
            "qkv_proj",
            "q_proj",
            "rotation_left",
            lambda t: t[:, :4],
            r"\(part q\): expected shape \[1, 8, 8\]",
        ),
        (
            "gate_up_proj",
            "up_proj",
            "weight_scale",
            lambda t: longer(t, 0),
            r"\(part 1\): expected shape \[256\]",
        ),
        ("down_proj", "down_proj", "weight_packed", lambda t: longer(t, 1), r"\[64, 8\], found \[64, 16\]"),
        ("down_proj", "down_proj", "low_rank_a", lambda t: longer(t, 1), r"\[2, 256\], found \[2, 512\]"),
        ("down_proj", "down_proj", "low_rank_b", Tensor.float, r"expected dtype bfloat16, found float32"),
        (
            "column",
            "c_proj",
            "weight_scale",
            lambda t: longer(t, 0),
            r"c_proj.weight_scale: expected shape \[48\]",
        ),
        (
            "replicated",
            "c_proj",
            "weight_packed",
            Tensor.float,
            r"c_proj.weight_packed: expected dtype int32",
        ),
    ],
)
def test_foreign_tensor_is_refused_while_loading(
    kind: str,
    name: str,
    key: str,
    change: Any,
    sentence: str,
    size: int,
    config: BWLAConfig,
    stored: Stored,
    on_rank: OnRank,
) -> None:
    """vLLM's own parameters would narrow or cast these without a word."""
    on_rank(size - 1, size)
    stored[name][key] = change(stored[name][key])
    layer = build(config, kind)
    with pytest.raises(StartError, match=sentence):
        load(layer, kind, stored)


def test_ranks_must_hold_whole_blocks(config: BWLAConfig, on_rank: OnRank) -> None:
    on_rank(0, 8)
    sentence = r"down_proj: expected a tensor-parallel size that divides its 4 (rotation )?groups"
    with pytest.raises(StartError, match=sentence):
        build(config, "down_proj")


@pytest.mark.parametrize(
    ("model", "sentence"), [(True, "needs a bias, but .* has none"), (False, "has no bias")]
)
def test_bias_must_be_where_the_model_has_one(
    model: bool, sentence: str, config: BWLAConfig, stored: Stored
) -> None:
    """vLLM leaves a missing bias uninitialised and drops one too many."""
    name = "layers.0.down_proj"
    config.specs = {name: dataclasses.replace(spec_of(config, "down_proj", HIDDEN, INNER), bias=not model)}
    layer = build(config, "down_proj", bias=model)
    load(layer, "down_proj", stored)
    with pytest.raises(StartError, match=rf"{name}.bias: the model .*{sentence}"):
        finish(layer)


def test_wanted_backend_is_used_and_must_exist(config: BWLAConfig, stored: Stored) -> None:
    config.backend = "torch"
    assert build(config, "down_proj").bwla.backend.name == "torch"
    config.backend = "abacus"
    with pytest.raises(StartError, match="backend 'abacus' does not exist"):
        build(config, "down_proj")


def test_backend_enters_the_compile_cache_key(config: BWLAConfig) -> None:
    """vLLM's key covers neither the environment nor the plugin's choice: a stale graph would be loaded."""
    from vllm.config import get_current_vllm_config

    current = get_current_vllm_config()
    before = current.compute_hash()
    build(config, "down_proj")
    assert (after := current.compute_hash()) != before
    build(config, "qkv_proj")
    assert current.compute_hash() == after


def test_dummy_load_gives_a_valid_layer(config: BWLAConfig, stored: Stored) -> None:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    get_current_vllm_config().load_config.load_format = "dummy"
    layer = build(config, "gate_up_proj")
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    y, _ = finish(layer)(tokens(HIDDEN))
    assert y.isfinite().all()
    assert y.std() > 0.1
