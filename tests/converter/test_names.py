"""Names of tensors and files: wrapped ones are read, all others are refused in one line that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bwla_converter.cli.convert import app
from bwla_converter.evaluation.perplexity import load_whole
from bwla_converter.hf import quantizer  # noqa: F401 - registers the format
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.source.model import check_values, open_source
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import INDEX_FILE
from safetensors.torch import load_file, save_file
from torch import equal
from typer.testing import CliRunner

WEIGHTS = "model.safetensors"

WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "twice": lambda name: f"module.module.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "compiled layers": lambda name: name.replace(".mlp.", "._orig_mod.mlp."),
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}".replace(
        ".self_attn", "._fsdp_wrapped_module.self_attn"
    ),
    "FSDP layers": lambda name: name.replace(
        ".mlp.", "._fsdp_wrapped_module._checkpoint_wrapped_module.mlp."
    ),
    "DeepSpeed": lambda name: f"_forward_module.module.{name}",
    "Lightning": lambda name: f"state_dict.model.{name}",
    "half wrapped": lambda name: f"module.{name}" if "mlp" in name else name,
    "head not wrapped": lambda name: name if name == "lm_head.weight" else f"module.{name}",
    "half without the prefix": lambda name: name.removeprefix("model.") if "self_attn" in name else name,
    "adapters deleted": lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
    "activation checkpoints": lambda name: name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."),
    "base model alone": lambda name: name.removeprefix("model."),
    "wrapped base model": lambda name: f"module.{name.removeprefix('model.')}",
    "one prefix too many": lambda name: f"model.{name}",
    "multimodal": lambda name: f"language_model.{name}",
    "multimodal inside": lambda name: name.replace("model.", "model.language_model."),
    "value head": lambda name: f"pretrained_model.{name}",
    "another wrapper": lambda name: f"policy.actor.{name}",
}


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Rename all tensors of a model, in its index too."""
    for path in folder.glob("*.safetensors"):
        tensors = {change(name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    if (folder / INDEX_FILE).is_file():
        index = json.loads((folder / INDEX_FILE).read_text())
        index["weight_map"] = {change(name): file for name, file in index["weight_map"].items()}
        (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("shards", [1, 3])
def test_names_with_prefixes_are_read_as_those_of_the_architecture(
    make_model, kind: str, shards: int
) -> None:
    folder = make_model(shards=shards)
    plain = open_source(str(folder))
    expected = plain.read(list(plain.entries))
    assert not plain.notes
    rename(folder, WRAPPED[kind])
    source = open_source(str(folder))
    check_values(source)
    assert source.entries.keys() == plain.entries.keys()
    assert all(equal(tensor, expected[name]) for name, tensor in source.read(list(source.entries)).items())
    assert source.notes[0].startswith("tensor names: ")
    assert " is read as " in source.notes[0]
    assert source.loadable == (kind in ("base model alone", "half without the prefix"))


@pytest.mark.parametrize("family", ["Llama", "Gemma 2", "Phi-3"])
@pytest.mark.parametrize("tied", [True, False])
def test_names_without_the_models_prefix_in_other_families(make_model, family: str, tied: bool) -> None:
    folder = make_model(family, tie_word_embeddings=tied or family == "Gemma 2")
    rename(folder, lambda name: name.removeprefix("model."))
    source = open_source(str(folder))
    assert "model.layers.0.mlp.down_proj.weight" in source.entries
    check_values(source)


def test_a_model_with_wrapped_names_is_converted_to_the_same_bytes(make_model, tmp_path: Path) -> None:
    folder = make_model()
    convert(Options(str(folder), tmp_path / "plain", rank=1, text_samples=0, recipe="data-free"))
    rename(folder, WRAPPED["both"])
    result = CliRunner().invoke(
        app, [str(folder), str(tmp_path / "out"), "--rank", "1", "--recipe", "data-free"]
    )
    assert result.exit_code == 0, result.output
    assert (
        "tensor names: module._orig_mod.lm_head.weight is read as lm_head.weight, and 24 others"
        in result.stdout
    )
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()
    report = json.loads((tmp_path / "out" / "bwla_report.json").read_text())
    assert report["no_samples"] == "transformers does not know the original's tensor names"
    with pytest.raises(
        SourceError, match=r"found 25 missing, like lm_head\.weight: save the model with transformers"
    ):
        load_whole(folder)
    assert load_whole(tmp_path / "out").config.model_type == "qwen3"


def test_names_that_would_meet_are_not_mapped(make_model) -> None:
    folder = make_model()
    tensors = load_file(folder / WEIGHTS)
    tensors["module.model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"module\.model\.norm\.weight is not a tensor of Qwen3ForCausalLM"):
        open_source(str(folder))


def test_names_beyond_the_prefix_are_still_checked(make_model) -> None:
    folder = make_model()
    tensors = load_file(folder / WEIGHTS)
    tensors.pop("model.norm.weight")
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(SourceError, match=r"found 1 problem.*\n  model\.norm\.weight is missing"):
        open_source(str(folder))


def adapter(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()


def unmerged(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.lora_A.default.weight"] = tensors[f"{name}.weight"].clone()
    save_file(tensors, folder / WEIGHTS)


def move_weights(name: str, config: bool = True) -> Callable[[Path], None]:
    """Return a function that renames a folder's weights, and removes its config.json if that is asked for."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / WEIGHTS).rename(folder / name)
        if not config:
            (folder / "config.json").unlink()

    return change


def no_index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")


def subfolder(folder: Path) -> None:
    inner = folder / "snapshots" / "0123"
    inner.mkdir(parents=True)
    for name in ("config.json", WEIGHTS):
        (folder / name).rename(inner / name)


def checkpoints_of_a_trainer(folder: Path) -> None:
    """Weights in a subfolder, beside settings and the state of the training."""
    inner = folder / "checkpoint-500"
    inner.mkdir()
    (folder / WEIGHTS).rename(inner / WEIGHTS)
    (inner / "config.json").write_bytes((folder / "config.json").read_bytes())
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (folder / name).write_text("")


def only_the_index(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_text("{}")

    return change


def content(name: str, data: bytes) -> Callable[[Path], None]:
    """Return a function that writes a file of a folder anew."""
    return lambda folder: (folder / name).write_bytes(data) and None


def half_a_file(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def link_to_nothing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/no/such/file")


def shards_of_deepspeed(folder: Path) -> None:
    (folder / "global_step500").mkdir()
    (folder / WEIGHTS).rename(folder / "global_step500" / "mp_rank_00_model_states.pt")


def saved_modules(folder: Path) -> None:
    rename(folder, lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default."))


def pipeline(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / WEIGHTS).unlink()
    (folder / "model_index.json").write_text("{}")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def notes_only(folder: Path) -> None:
    empty(folder)
    for number in range(9):
        (folder / f"notes-{number}.txt").write_text("")


def other_names(folder: Path) -> None:
    rename(folder, lambda name: f"bert.encoder.{name.replace('layers', 'layer').replace('weight', 'kernel')}")


@pytest.mark.parametrize(
    ("change", "found", "advice"),
    [
        (
            adapter,
            r"an adapter of Qwen/Qwen3-8B \(adapter_config.json, adapter_model.safetensors\)",
            "merge it",
        ),
        (adapter_alone, "an adapter of Qwen/Qwen3-8B", "merge_and_unload"),
        (unmerged, r"an adapter beside them \(model.layers.0.mlp.up_proj.lora_A", "merge_and_unload"),
        (move_weights("pytorch_model.bin"), "pytorch_model.bin, which is pickled", "save_pretrained"),
        (move_weights("pytorch_model-00001-of-00002.bin"), "pytorch_model-00001", "save_pretrained"),
        (move_weights("consolidated.00.pth", config=False), "their maker's own format", "for transformers"),
        (move_weights("consolidated.safetensors"), "their maker's own format", "for transformers"),
        (move_weights("model.fp16.safetensors"), "model.fp16.safetensors", "rename it to model.safetensors"),
        (move_weights("weights.gguf"), "GGUF files", "give one of them"),
        (move_weights("tf_model.h5"), "TensorFlow weights", "save the model with transformers"),
        (move_weights("flax_model.msgpack"), "Flax weights", "save the model with transformers"),
        (move_weights("model.onnx"), "an ONNX model", "save the model with transformers"),
        (checkpoints_of_a_trainer, "found a model in checkpoint-500", "give that folder"),
        (
            only_the_index("pytorch_model.bin.index.json"),
            "bin.index.json, which is pickled",
            "save_pretrained",
        ),
        (only_the_index("latest"), "found config.json, latest", "get the weights"),
        (move_weights("model_state.pdparams"), "found config.json, model_state.pdparams", "get the weights"),
        (move_weights("model.safetensors.partial"), "model.safetensors.partial", "get the weights"),
        (move_weights("model-rank-0-part-0.safetensors"), "save_sharded_state", "the model that was served"),
        (move_weights("model.pt"), "a checkpoint in pickle", "save the model with transformers"),
        (shards_of_deepspeed, "expected model.safetensors or .*, found config.json", "get the weights"),
        (link_to_nothing, "expected model.safetensors or .*, found config.json", "get the weights"),
        (half_a_file, "", "download or convert it again"),
        (content(WEIGHTS, b""), "", "download or convert it again"),
        (
            content(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
            "",
            "download or convert it again",
        ),
        (content(INDEX_FILE, b"{"), "", "get it again"),
        (saved_modules, r"an adapter beside them \(lm_head.modules_to_save", "merge_and_unload"),
        (no_index, "expected model.safetensors.index.json beside", "get it from the model's repository"),
        (subfolder, "found one in snapshots/0123", "give that folder"),
        (pipeline, "a diffusers pipeline", "cannot be converted"),
        (without_config, "expected a config.json beside model.safetensors", "get it from"),
        (empty, "found no files", "check the path"),
        (notes_only, "notes-0.txt, .*notes-4.txt and 4 more", "give the folder of a model"),
        (other_names, "25 tensors named like bert.encoder", "transformers has saved"),
    ],
)
def test_names_of_something_else_are_refused_in_one_line(
    make_model, change: Callable[[Path], None], found: str, advice: str
) -> None:
    folder = make_model()
    for path in folder.iterdir():
        if path.name not in ("config.json", WEIGHTS):
            path.unlink()
    change(folder)
    with pytest.raises(SourceError, match=rf"^{folder}[^:]*: .*{found}.*{advice}") as error:
        open_source(str(folder))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert str(error.value).count("weight") <= 6


def test_the_path_of_a_file_names_its_folder(make_model) -> None:
    folder = make_model()
    with pytest.raises(SourceError, match=f"found another file: give {folder}"):
        open_source(str(folder / WEIGHTS))
