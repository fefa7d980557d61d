"""BWLA checkpoints in transformers: the reference implementation's numbers, saving, and refusal of damage."""

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bwla_converter.hf import modules as hf
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_kernels import reference
from bwla_kernels.errors import FormatError
from bwla_kernels.format.folder import read_folder
from bwla_kernels.head import head_reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

IDS = torch.arange(24).view(1, 24)


@pytest.fixture
def checkpoint(make_model, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    convert(Options(str(make_model("Qwen2", shards=2)), out, rank=2, recipe="data-free"))
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
        assert layer.rotation_left.dtype == torch.float16
        assert layer.weight_scale.dtype == torch.bfloat16
        assert layer.low_rank_a.dtype == torch.bfloat16
        assert layer.weight_packed.dtype == torch.int32
    assert model.model.norm.weight.dtype == dtype
    assert torch.isfinite(model(IDS).logits).all()


@torch.no_grad()
def test_logits_equal_those_of_dequantized_weights_without_activation_quantization(
    make_model, tmp_path
) -> None:
    folder, out = make_model("Qwen2", dtype=torch.float32), tmp_path / "out"
    convert(Options(str(folder), out, rank=2, bits=16, recipe="data-free"))
    ours = load(out, dtype=torch.float32)
    assert isinstance(ours.lm_head, hf.BWLAHead)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in ours.named_modules():
        if isinstance(module, hf.BWLAEmbedding):
            plain.model.embed_tokens.weight.copy_(module.weight_int8 * module.weight_scale.unsqueeze(1))
        elif isinstance(module, hf.BWLAHead):
            plain.lm_head.weight.copy_(module.weight_int8 * module.weight_scale.unsqueeze(1))
        elif isinstance(module, hf.BWLALinear):
            plain.get_submodule(name).weight.copy_(reference.dequantize(module.stored(), module.spec))
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_best_backend_agrees_with_the_reference(checkpoint: Path, monkeypatch) -> None:
    best = load(checkpoint, dtype=torch.float32)(IDS).logits
    defined = load(checkpoint, "reference", monkeypatch, dtype=torch.float32)(IDS).logits
    assert (best - defined).norm() <= 2e-3 * defined.norm()


@pytest.mark.parametrize("family", ["Qwen2", "Gemma 2", "Phi-3"])
def test_saves_back_unchanged(make_model, tmp_path: Path, family: str) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    convert(Options(str(make_model(family, shards=2)), out, rank=2, recipe="data-free"))
    load(out).save_pretrained(again)
    assert tensor_digests(again) == tensor_digests(out)
    assert json.loads((again / "config.json").read_text()) == json.loads((out / "config.json").read_text())
    assert torch.equal(load(again)(IDS).logits, load(out)(IDS).logits)


EMBEDDED = [("Qwen3", True), ("Qwen3", False), ("Gemma 3", True)]
"""Families, and whether their head is tied to the embedding; Gemma's class multiplies embeddings."""


@pytest.mark.parametrize(("family", "tied"), EMBEDDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_8_bit_embedding_equals_the_dequantized_one(
    make_model, tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    folder, out = make_model(family, tie_word_embeddings=tied), tmp_path / "out"
    convert(Options(str(folder), out, rank=2, recipe="data-free"))
    ours = load(out, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    embedding = ours.model.embed_tokens
    assert isinstance(embedding, hf.BWLAEmbedding)
    plain.model.embed_tokens.weight.copy_(embedding.weight_int8 * embedding.weight_scale.unsqueeze(1))
    rows = embedding(IDS)
    assert rows.dtype == ours.dtype == dtype
    assert torch.equal(rows, plain.model.embed_tokens(IDS))
    assert isinstance(ours.lm_head, hf.BWLATiedHead) is tied
    if tied:
        hidden = torch.randn(2, 64, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(ours.lm_head(hidden), head_reference(hidden, **embedding.stored()))


@pytest.mark.parametrize(("family", "tied"), EMBEDDED)
def test_an_8_bit_embedding_survives_what_users_do_to_a_model(
    make_model, tmp_path: Path, family: str, tied: bool
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    convert(Options(str(make_model(family, tie_word_embeddings=tied)), out, rank=2, recipe="data-free"))
    model = load(out)
    logits = model(IDS).logits
    model.tie_weights()
    copied = copy.deepcopy(model)
    model.model.embed_tokens.weight_int8.zero_()
    assert torch.equal(copied(IDS).logits, logits)
    copied.save_pretrained(again)
    assert tensor_digests(again) == tensor_digests(out)
    assert json.loads((again / "config.json").read_text()) == json.loads((out / "config.json").read_text())
    assert copied.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 26)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_model_is_the_one_asked_for(checkpoint: Path, dtype: torch.dtype) -> None:
    assert load(checkpoint, dtype=dtype).dtype == dtype


def test_a_model_is_described_as_it_is_saved(checkpoint: Path, tmp_path: Path) -> None:
    """Its dtype, its size and its head may have changed since it was loaded."""
    again = tmp_path / "again"
    load(checkpoint, dtype=torch.float32).save_pretrained(again)
    saved = json.loads((again / "config.json").read_text())["quantization_config"]
    assert saved["tensors"]["model.norm.weight"] == "float32 [64]"
    assert torch.isfinite(load(again)(IDS).logits).all()
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3, pad_token_id=0)
    classifier.save_pretrained(again)
    saved = json.loads((again / "config.json").read_text())["quantization_config"]
    assert saved["config"]["architectures"] == ["Qwen2ForSequenceClassification"]
    assert saved["tensors"]["score.weight"] == "bfloat16 [3, 64]"
    loaded = AutoModelForSequenceClassification.from_pretrained(again)
    assert torch.equal(loaded.score.weight, classifier.score.weight)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"intermediate_size": 192}, "config.json: expected intermediate_size 128, .* found 192: restore"),
        ({"intermediate_size": None}, "config.json: expected intermediate_size 128, .* found 22016: restore"),
        ({"tie_word_embeddings": True}, "config.json: expected tie_word_embeddings False, .* found True"),
    ],
)
def test_a_config_that_was_changed_is_refused(checkpoint: Path, edit, change, sentence: str) -> None:
    """A key that was removed has the default of transformers."""
    edit.json(checkpoint / "config.json", **change)
    with pytest.raises(FormatError, match=sentence):
        load(checkpoint)


def test_a_size_that_the_caller_changes_is_refused(checkpoint: Path) -> None:
    with pytest.raises(FormatError, match=r"expected vocab_size 96, .* found 32: .*from_pretrained"):
        load(checkpoint, vocab_size=32)


def test_a_checkpoint_without_a_list_of_tensors_still_loads(checkpoint: Path, edit) -> None:
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    logits = load(checkpoint)(IDS).logits
    older = {key: value for key, value in config.items() if key not in ("tensors", "config")}
    edit.json(checkpoint / "config.json", quantization_config=older)
    assert torch.equal(load(checkpoint)(IDS).logits, logits)


def test_a_checkpoint_of_version_1_still_loads(make_model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(Options(str(make_model("Qwen2")), out, rank=2, embedding_bits=16, recipe="data-free"))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    assert not {"planes", "embedding"} & config.keys()
    assert type(load(out).model.embed_tokens) is torch.nn.Embedding


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "weight_int8",
            lambda t: None,
            r"model.embed_tokens.weight_int8 is missing, expected shape",
        ),
        (
            "weight_int8",
            lambda t: t[:, :32].contiguous(),
            r"weight_int8: expected shape \[96, 64\], found \[96, 32\]",
        ),
        ("weight_scale", lambda t: t.bfloat16(), "weight_scale: expected dtype float32, found bfloat16"),
        ("weight_scale", lambda t: -t, "model.embed_tokens.weight_scale: expected positive"),
    ],
)
def test_a_damaged_embedding_is_refused(checkpoint: Path, edit, name: str, change, sentence: str) -> None:
    name = f"model.embed_tokens.{name}"
    edit.tensor(checkpoint / read_folder(checkpoint)[name].file, name, change)
    with pytest.raises(FormatError, match=sentence):
        load(checkpoint)


@pytest.mark.parametrize(
    ("tied", "name", "sentence"),
    [
        (
            True,
            "lm_head.weight",
            "lm_head.weight is not a tensor of this model: expected only those that config.json lists",
        ),
        (True, "model.embed_tokens.weight", "expected no such tensor beside model.embed_tokens.weight_int8"),
        (False, "lm_head.weight", "expected no such tensor beside lm_head.weight_int8"),
    ],
)
def test_an_unquantized_tensor_beside_the_8_bit_one_is_refused(
    make_model, tmp_path: Path, tied: bool, name: str, sentence: str
) -> None:
    """Loaders would use one of the two, and not the same one."""
    out = tmp_path / "out"
    convert(Options(str(make_model(tie_word_embeddings=tied)), out, recipe="data-free"))
    file = out / "model.safetensors"
    save_file({**load_file(file), name: torch.ones(96, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=sentence):
        load(out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@torch.no_grad()
def test_runs_on_a_gpu_through_the_same_ops(checkpoint: Path) -> None:
    on_cpu = load(checkpoint, dtype=torch.float32)(IDS).logits
    on_gpu = load(checkpoint, dtype=torch.float32).cuda()(IDS.cuda()).logits.cpu()
    assert (on_gpu - on_cpu).norm() <= 2e-3 * on_cpu.norm()


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD = "print(type(AutoModelForCausalLM.from_pretrained({folder!r}).model.layers[0].mlp.up_proj).__name__)"


@pytest.mark.parametrize(
    "imports",
    [
        "import bwla_converter.hf\nfrom transformers import AutoModel, AutoModelForCausalLM",
        "from transformers import AutoModel, AutoModelForCausalLM\nimport bwla_converter.hf",
    ],
)
def test_importing_the_package_is_enough_in_either_order(checkpoint: Path, imports: str) -> None:
    assert run_python(f"{imports}\n{LOAD.format(folder=str(checkpoint))}") == "BWLALinear"


def test_another_auto_class_is_refused(checkpoint: Path) -> None:
    with pytest.raises(
        FormatError, match="found none called .*: load the checkpoint with AutoModelForCausalLM"
    ):
        AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: None, "model.norm.weight is missing, expected shape"),
        (lambda t: t[:-1].contiguous(), r"model.norm.weight: expected shape \[64\], found \[63\]"),
        (
            lambda t: t.to(torch.int32),
            "model.norm.weight: expected dtype bfloat16, found int32",
        ),
        (lambda t: t * float("nan"), "model.norm.weight: expected finite values, found NaN"),
    ],
)
def test_what_is_not_quantized_is_checked_too(checkpoint: Path, edit, change, sentence: str) -> None:
    """transformers only warns about a missing norm and initializes it at random."""
    edit.tensor(checkpoint / read_folder(checkpoint)["model.norm.weight"].file, "model.norm.weight", change)
    with pytest.raises(FormatError, match=sentence):
        load(checkpoint)


def test_a_stray_weight_file_is_refused(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    (checkpoint / "old.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(FormatError, match=r"old\.safetensors: expected only files of this checkpoint"):
        load(checkpoint)


def test_an_index_that_is_no_json_is_refused_before_transformers_reads_it(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text("{")
    with pytest.raises(FormatError, match=r"index\.json: not valid JSON"):
        load(checkpoint)


def test_invalid_values_are_refused(checkpoint: Path, edit) -> None:
    shard = checkpoint / read_folder(checkpoint)["model.layers.0.mlp.up_proj.rotation_left"].file
    edit.tensor(shard, "model.layers.0.mlp.up_proj.rotation_left", lambda t: t * 2)
    with pytest.raises(
        FormatError, match=r"layers\.0\.mlp\.up_proj\.rotation_left: expected an orthogonal matrix"
    ):
        load(checkpoint)


def test_a_missing_tensor_is_refused(checkpoint: Path, edit) -> None:
    shard = checkpoint / read_folder(checkpoint)["model.layers.0.mlp.up_proj.weight_scale"].file
    edit.tensor(shard, "model.layers.0.mlp.up_proj.weight_scale", lambda t: None)
    with pytest.raises(FormatError, match=r"up_proj\.weight_scale is missing, expected shape"):
        load(checkpoint)


def test_a_config_of_another_version_is_refused(checkpoint: Path, edit) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    edit.json(
        checkpoint / "config.json", quantization_config=config["quantization_config"] | {"format_version": 7}
    )
    with pytest.raises(FormatError, match="expected format_version 1 or 2, found 7"):
        load(checkpoint)
