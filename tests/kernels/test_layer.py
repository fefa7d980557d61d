"""Validation of one stored layer: every hostile change gets its own sentence."""

import pytest
import torch
from bwla_kernels.errors import FormatError
from bwla_kernels.format import LayerSpec, tensor_specs, validate_layer

SPEC = LayerSpec(24, 192, 2, 8, 12, rank=2, bias=True)


def changed(make_layer, name: str, change):
    layer = make_layer(SPEC, 1)
    layer[name] = change(layer[name].clone())
    return layer


def put(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def test_a_valid_layer_passes(make_layer) -> None:
    validate_layer("a.q_proj", make_layer(SPEC, 0), SPEC)
    assert list(make_layer(SPEC, 0)) == list(tensor_specs(SPEC))


@pytest.mark.parametrize("name", list(tensor_specs(SPEC)))
def test_every_missing_tensor_is_named(make_layer, name: str) -> None:
    layer = make_layer(SPEC, 0)
    del layer[name]
    with pytest.raises(FormatError, match=rf"a\.q_proj\.{name}: .*found no such tensor"):
        validate_layer("a.q_proj", layer, SPEC)


def test_an_extra_tensor_is_named(make_layer) -> None:
    with pytest.raises(FormatError, match=r"a\.q_proj\.g_idx: not a tensor of this layer's format"):
        validate_layer("a.q_proj", {**make_layer(SPEC, 0), "g_idx": torch.ones(1)}, SPEC)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("weight_packed", lambda t: t.float(), "expected dtype int32, found float32"),
        ("weight_packed", lambda t: t[:, :-1], r"expected shape [24, 6], found [24, 5]"),
        ("weight_scale", put(0.0), "expected positive scales, found 0"),
        ("weight_scale", put(float("nan")), "expected finite values"),
        ("column_scale", put(-1.0), "expected positive scales, found -1"),
        ("column_scale", lambda t: t.half(), "expected dtype bfloat16, found float16"),
        ("rotation_left", put(0.9), "expected an orthogonal matrix to 0.001"),
        ("rotation_right", lambda t: t * 1.01, "expected an orthogonal matrix to 0.001"),
        ("rotation_right", put(float("inf")), "expected finite values"),
        ("low_rank_a", put(float("nan")), "expected finite values"),
        ("low_rank_b", lambda t: t.float(), "expected dtype bfloat16, found float32"),
        ("bias", lambda t: t[:-1], "expected shape [24], found [23]"),
    ],
)
def test_every_damage_has_its_sentence(make_layer, name: str, change, sentence: str) -> None:
    with pytest.raises(FormatError, match=rf"a\.q_proj\.{name}: ") as error:
        validate_layer("a.q_proj", changed(make_layer, name, change), SPEC)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((0, 64, 1, 8, 8), "sizes must be positive"),
        ((4, 64, 1, 8, 4), "covers 32 columns, but the layer reads 64"),
        ((4, 64, 4, 4, 4), "a rotation group must be a multiple of 32 columns wide, found 16"),
        ((4, 64, 1, 8, 8, -1), "the rank not negative"),
        ((4, 64, 1, 8, 8, 0, 1), "activation bits must be 2..8 or 16, found 1"),
        ((4, 64, 1, 8, 8, 0, 6, 0.0), "clip must lie in"),
    ],
)
def test_contradicting_sizes_are_refused(numbers: tuple, sentence: str) -> None:
    with pytest.raises(FormatError) as error:
        LayerSpec(*numbers)
    assert sentence in str(error.value)
