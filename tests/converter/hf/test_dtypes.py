"""Casts of a loaded model: `to(dtype)` and its relatives change what the model computes in, not what it stores."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bwla_converter.hf import modules as hf
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels.errors import BackendError
from bwla_kernels.format import tensor_specs
from bwla_kernels.format.head import head_tensor_specs
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

IDS = torch.arange(24).view(1, 24)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FAMILIES = [("Qwen2", False), ("Qwen3", True), ("Gemma 3", True)]
"""Families, and whether their head is tied to the embedding: biases, a tied head, an embedding with a factor."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that converts a random bfloat16 model of a family once."""
    from benchmarks.common.tiny_models import write_model

    root, made = tmp_path_factory.mktemp("dtypes"), {}

    def make(family: str = "Qwen2", tied: bool = False) -> Path:
        if family not in made:
            source = write_model(root / family / "source", family, lively=True, tie_word_embeddings=tied)
            made[family] = root / family / "out"
            convert(Options(str(source), made[family], rank=2, recipe="data-free"))
        return made[family]

    return make


def load(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def stored_digest(model: nn.Module) -> str:
    """Return a digest of all tensors of the format, their dtypes included."""
    digest = hashlib.sha256()
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in FORMAT_NAMES:
            digest.update(f"{name} {buffer.dtype}".encode())
            digest.update(buffer.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


FORMAT_NAMES = {
    "weight_packed", "weight_scale", "rotation_left", "rotation_right", "column_scale", "low_rank_a", "low_rank_b",
    "weight_int8",
}  # fmt: skip


def quantized(model: nn.Module) -> list[nn.Module]:
    kinds = (hf.BWLALinear, hf.BWLAHead, hf.BWLAEmbedding)
    return [module for module in model.modules() if isinstance(module, kinds)]


def same_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Check that stored tensors have the dtypes of the format, and everything else the dtype of the model."""
    for module in quantized(model):
        if isinstance(module, hf.BWLATiedHead):
            continue
        specs = (
            tensor_specs(module.spec) if isinstance(module, hf.BWLALinear) else head_tensor_specs(module.spec)
        )
        for key, spec in specs.items():
            assert getattr(module, key).dtype == (dtype if key == "bias" else spec.dtypes[0]), key
        if isinstance(module, hf.BWLAEmbedding):
            assert module.dtype == dtype
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.dtype == dtype


@torch.no_grad()
def outputs(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Return what each quantized module computes by itself."""
    results = []
    for module in quantized(model):
        if isinstance(module, hf.BWLAEmbedding):
            results.append(module(IDS))
        else:
            generator = torch.Generator().manual_seed(module.in_features)
            results.append(module(torch.randn(3, module.in_features, generator=generator).to(dtype)))
        assert results[-1].dtype == dtype
    return results


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_from_pretrained_loads_in_any_dtype(checkpoint, family: str, tied: bool, dtype: torch.dtype) -> None:
    model = load(checkpoint(family, tied), dtype)
    same_dtypes(model, dtype)
    logits = model(IDS).logits
    assert logits.dtype == dtype
    expected = load(checkpoint(family, tied), torch.float32)(IDS).logits
    assert (logits.float() - expected).norm() <= 0.25 * expected.norm()  # of one-bit weights, drawn at random


def test_dtype_auto_is_that_of_the_config(checkpoint) -> None:
    same_dtypes(load(checkpoint(), "auto"), torch.bfloat16)
    same_dtypes(AutoModelForCausalLM.from_pretrained(checkpoint()), torch.bfloat16)


CASTS = {
    "to(dtype)": lambda model, dtype: model.to(dtype),
    "to(dtype=)": lambda model, dtype: model.to(dtype=dtype),
    "to(device, dtype)": lambda model, dtype: model.to("cpu", dtype),
    "to(tensor)": lambda model, dtype: model.to(torch.empty(1, dtype=dtype)),
    "type()": lambda model, dtype: model.type(dtype),
}


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("before", DTYPES)
@pytest.mark.parametrize("after", DTYPES)
@torch.no_grad()
def test_a_cast_model_computes_as_one_loaded_in_that_dtype(
    checkpoint, family: str, tied: bool, before: torch.dtype, after: torch.dtype
) -> None:
    folder = checkpoint(family, tied)
    model, loaded = load(folder, before), load(folder, after)
    model(IDS)  # so that the backends have prepared their tensors
    digest = stored_digest(model)
    assert model.to(after) is model
    same_dtypes(model, after)
    assert stored_digest(model) == digest == stored_digest(loaded)
    for found, expected in zip(outputs(model, after), outputs(loaded, after), strict=True):
        assert torch.equal(found, expected)
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_every_way_to_cast(checkpoint, cast: Callable[[nn.Module, torch.dtype], nn.Module]) -> None:
    model = load(checkpoint(), torch.float32)
    digest = stored_digest(model)
    cast(model, torch.float16)
    if cast is CASTS["type()"]:
        assert stored_digest(model) == digest
    else:
        same_dtypes(model, torch.float16)
    assert stored_digest(model) == digest


def test_casts_there_and_back_lose_nothing(checkpoint) -> None:
    model = load(checkpoint(), torch.bfloat16)
    before = outputs(model, torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float32, torch.bfloat16):
        model.to(dtype)
    model.bfloat16()
    for found, expected in zip(outputs(model, torch.bfloat16), before, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["half", "float"])
def test_transformers_refuses_half_and_float_of_any_quantized_model(checkpoint, method: str) -> None:
    with pytest.raises(ValueError, match=rf"`\.{method}\(\)` is not supported for quantized model"):
        getattr(load(checkpoint(), torch.bfloat16), method)()


@pytest.mark.parametrize("method", ["half", "float", "bfloat16"])
def test_submodules_can_be_cast(checkpoint, method: str) -> None:
    model = load(checkpoint("Qwen3", True), torch.bfloat16)
    dtype = {"half": torch.float16, "float": torch.float32, "bfloat16": torch.bfloat16}[method]
    expected = outputs(load(checkpoint("Qwen3", True), dtype), dtype)
    digest = stored_digest(model)
    getattr(model.model, method)()
    getattr(model.lm_head, method)()
    assert stored_digest(model) == digest
    for found, wanted in zip(outputs(model, dtype), expected, strict=True):
        assert torch.equal(found, wanted)
    embedding = load(checkpoint("Qwen3", True), torch.bfloat16).model.embed_tokens
    assert getattr(embedding, method)()(IDS).dtype == dtype


@pytest.mark.parametrize(
    "cast", [lambda m: m.double(), lambda m: m.to(torch.float64), lambda m: m.to(torch.complex64)]
)
def test_dtypes_without_a_kernel_are_refused(checkpoint, cast) -> None:
    model = load(checkpoint(), torch.bfloat16)
    with pytest.raises(BackendError, match="expected a cast to bfloat16, float16 or float32, found torch"):
        cast(model)


def test_moving_to_a_device_keeps_everything(checkpoint) -> None:
    model = load(checkpoint(), torch.bfloat16)
    digest = stored_digest(model)
    logits = model(IDS).logits
    prepared = [module._prepared for module in quantized(model) if module._prepared]
    assert prepared
    model.to("cpu").cpu().to(device="cpu", non_blocking=True)
    assert [module._prepared for module in quantized(model) if module._prepared] == prepared
    assert stored_digest(model) == digest
    assert torch.equal(model(IDS).logits, logits)
    model.to("meta")
    assert {buffer.device.type for module in quantized(model) for buffer in module.buffers()} == {"meta"}


def test_a_cast_model_is_saved_with_the_tensors_of_the_format(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    model = load(folder, torch.bfloat16).to(torch.float16)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", "auto")
    same_dtypes(again, torch.float16)
    assert stored_digest(again) == stored_digest(load(folder, torch.bfloat16))
    for found, expected in zip(outputs(again, torch.float16), outputs(model, torch.float16), strict=True):
        assert torch.equal(found, expected)
    written = load_file(next((tmp_path / "again").glob("*.safetensors")))
    assert written["model.norm.weight"].dtype == torch.float16
