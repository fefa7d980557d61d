"""A BWLA checkpoint in transformers: same numbers as the definition, saves back unchanged, refuses damage."""

import hashlib
from pathlib import Path

import bwla_converter.hf as hf
import pytest
import torch
from bwla_converter.pipeline import Options, convert
from bwla_kernels import reference
from bwla_kernels.errors import FormatError
from bwla_kernels.format.folder import read_folder
from safetensors import safe_open
from transformers import AutoModelForCausalLM

IDS = torch.arange(24).view(1, 24)


@pytest.fixture
def checkpoint(make_model, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    convert(Options(str(make_model("Qwen2", shards=2)), out, rank=2))
    return out


def load(folder: Path, backend: str | None = None, monkeypatch=None, **options):
    if backend:
        monkeypatch.setenv(hf.BACKEND_VARIABLE, backend)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tensor_digests(folder: Path) -> dict[str, tuple[str, str]]:
    digests = {}
    for name, entry in read_folder(folder).items():
        with safe_open(folder / entry.file, framework="pt") as handle:
            tensor = handle.get_tensor(name)
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        digests[name] = (str(tensor.dtype), hashlib.sha256(raw).hexdigest())
    return digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_tensors_keep_their_dtypes(checkpoint: Path, dtype) -> None:
    model = load(checkpoint, dtype=dtype)
    layers = [module for module in model.modules() if isinstance(module, hf.BWLALinear)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.rotation_left.dtype == torch.float32
        assert layer.weight_scale.dtype == torch.float32
        assert layer.low_rank_a.dtype == torch.bfloat16
        assert layer.weight_packed.dtype == torch.int32
    assert model.model.norm.weight.dtype == dtype
    assert torch.isfinite(model(IDS).logits).all()


@torch.no_grad()
def test_logits_equal_those_of_dequantized_weights_without_activation_quantization(
    make_model, tmp_path
) -> None:
    folder, out = make_model("Qwen2", dtype=torch.float32), tmp_path / "out"
    convert(Options(str(folder), out, rank=2, bits=16))
    ours = load(out, dtype=torch.float32)
    assert isinstance(ours.lm_head, hf.BWLAHead)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in ours.named_modules():
        if isinstance(module, hf.BWLAHead):
            plain.lm_head.weight.copy_(module.weight_int8 * module.weight_scale.unsqueeze(1))
        elif isinstance(module, hf.BWLALinear):
            plain.get_submodule(name).weight.copy_(reference.dequantize(module.stored(), module.spec))
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_best_backend_agrees_with_the_definition(checkpoint: Path, monkeypatch) -> None:
    best = load(checkpoint, dtype=torch.float32)(IDS).logits
    defined = load(checkpoint, "reference", monkeypatch, dtype=torch.float32)(IDS).logits
    assert (best - defined).norm() <= 2e-3 * defined.norm()


def test_saves_back_unchanged(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint).save_pretrained(tmp_path / "again")
    assert tensor_digests(tmp_path / "again") == tensor_digests(checkpoint)
    assert torch.equal(load(tmp_path / "again")(IDS).logits, load(checkpoint)(IDS).logits)


def test_damage_is_refused_with_one_sentence(checkpoint: Path, edit) -> None:
    shard = checkpoint / read_folder(checkpoint)["model.layers.0.mlp.up_proj.rotation_left"].file
    edit.tensor(shard, "model.layers.0.mlp.up_proj.rotation_left", lambda t: t * 2)
    with pytest.raises(
        FormatError, match=r"layers\.0\.mlp\.up_proj\.rotation_left: expected an orthogonal matrix"
    ):
        load(checkpoint)


def test_a_missing_tensor_is_refused_with_one_sentence(checkpoint: Path, edit) -> None:
    shard = checkpoint / read_folder(checkpoint)["model.layers.0.mlp.up_proj.weight_scale"].file
    edit.tensor(shard, "model.layers.0.mlp.up_proj.weight_scale", lambda t: None)
    with pytest.raises(FormatError, match=r"up_proj\.weight_scale should be in"):
        load(checkpoint)


def test_a_config_of_another_version_is_refused(checkpoint: Path, edit) -> None:
    import json

    config = json.loads((checkpoint / "config.json").read_text())
    edit.json(
        checkpoint / "config.json", quantization_config=config["quantization_config"] | {"format_version": 7}
    )
    with pytest.raises(FormatError, match="expected format_version 1, found 7"):
        load(checkpoint)
