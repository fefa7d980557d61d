"""Attention in bfloat16: the same as in float32 up to rounding, for every family that can use it."""

import pytest
import torch
from bwla_converter.hf.attention import NAME
from transformers import AutoModelForCausalLM

from benchmarks.common.tiny_models import FAMILIES

WITHOUT_SOFT_CAP = [family for family in FAMILIES if family != "Gemma 2"]


@torch.no_grad()
@pytest.mark.parametrize("family", WITHOUT_SOFT_CAP)
def test_it_agrees_with_float32(make_model, family: str) -> None:
    folder = make_model(family, dtype=torch.float32, lively=True)
    ids = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
    rounded, exact = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name)
        .eval()(ids)
        .logits
        for name in (NAME, "sdpa")
    )
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 0.02
