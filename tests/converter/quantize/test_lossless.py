"""Weights of two or three values: recognized, stored without loss, and refused where a value does not fit."""

import pytest
import torch
from bwla_converter.quantize.lossless import Groups, find_groups, store_lossless
from bwla_kernels.errors import SourceError
from bwla_kernels.format import LayerSpec, validate_layer
from bwla_kernels.reference import dequantize
from few_values import in_three_values, in_two_values
from hypothesis import given, settings
from hypothesis import strategies as st
from random_tensors import normal
from torch import Tensor


def spec_for(weight: Tensor, groups: Groups) -> LayerSpec:
    rows, columns = weight.shape
    return LayerSpec(
        rows, columns, columns // groups.size, 1, groups.size, bits=8, planes=groups.planes, grouped=True
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 4),
    size=st.sampled_from([32, 64, 128, 256]),
    planes=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 100),
)
def test_such_weights_are_found_and_stored_exactly(
    rows: int, groups: int, size: int, planes: int, dtype: torch.dtype, seed: int
) -> None:
    change = in_two_values if planes == 1 else in_three_values
    weight = change(normal(rows, groups * size, seed=seed), size).to(dtype)
    found = find_groups(weight)
    assert found is not None
    assert found.planes <= planes
    assert found.size >= size
    stored = store_lossless("a.q_proj", weight, spec_for(weight, found))
    validate_layer("a.q_proj", stored, spec_for(weight, found))
    assert torch.equal(dequantize(stored, spec_for(weight, found)), weight.float())


def test_a_scale_of_the_whole_row_is_one_group() -> None:
    weight = in_three_values(normal(6, 192), 192)
    assert find_groups(weight) == Groups(2, 192)


@pytest.mark.parametrize("weight", [normal(4, 64), in_two_values(normal(4, 64), 16), normal(4, 48)])
def test_other_weights_are_not_found(weight: Tensor) -> None:
    assert find_groups(weight) is None


def test_groups_of_zeros_have_scale_zero() -> None:
    weight = in_two_values(normal(3, 128), 64)
    weight[1, 64:] = 0
    assert find_groups(weight) == Groups(1, 64)
    stored = store_lossless("q_proj", weight, spec_for(weight, Groups(1, 64)))
    validate_layer("q_proj", stored, spec_for(weight, Groups(1, 64)))
    assert stored["weight_scale"][1, 1] == 0
    assert torch.equal(dequantize(stored, spec_for(weight, Groups(1, 64))), weight)


@pytest.mark.parametrize(
    ("largest", "dtype"), [(0.25, torch.float16), (2.0**17, torch.bfloat16), (1 / 3, torch.float32)]
)
def test_scales_have_the_first_dtype_that_holds_them(largest: float, dtype: torch.dtype) -> None:
    weight = normal(2, 32).sign() * largest
    stored = store_lossless("q_proj", weight, spec_for(weight, Groups(1, 32)))
    assert stored["weight_scale"].dtype == dtype
    assert torch.equal(dequantize(stored, spec_for(weight, Groups(1, 32))), weight)


@pytest.mark.parametrize(
    ("planes", "values"), [(1, "two values, [+]d and -d,"), (2, "three values, [+]d, 0 and -d,")]
)
def test_another_value_is_named(planes: int, values: str) -> None:
    weight = (in_two_values if planes == 1 else in_three_values)(normal(5, 64).abs() + 1, 32)
    weight[3, 40] = 0.001
    magnitude = weight[3, 41].item()
    found = rf"found the magnitudes 0.001, {magnitude:g} in row 3, columns 32 to 63"
    sentence = rf"{values} in each group of 32 columns, .* {found}"
    with pytest.raises(SourceError, match=rf"a.q_proj.weight: expected {sentence}"):
        store_lossless("a.q_proj", weight, spec_for(weight, Groups(planes, 32)))


def test_together_is_what_both_can_be_stored_in() -> None:
    assert Groups(1, 256).together(Groups(2, 128)) == Groups(2, 128)
    weight = in_two_values(normal(4, 256), 256)
    stored = store_lossless("q_proj", weight, spec_for(weight, Groups(2, 128)))
    assert torch.equal(dequantize(stored, spec_for(weight, Groups(2, 128))), weight)
