"""Files beside the weights: all of them are in the output, except for those that there is a reason to leave out."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.checkpoint.integrity import check_hashes
from bwla_converter.options import Options, Summary
from bwla_converter.pipeline import convert
from bwla_converter.source.folder.files import LARGE, beside_bytes, files_beside, select_files
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import read_json

pytestmark = pytest.mark.usefixtures("few_rounds")

KEPT = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "NOTICE",
    "USE_POLICY.md",
    "LICENSE-MODEL",
    "generation_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "assets/deep/figure.png",
    "preprocessor_config.json",
    "README_zh.md",
    "Modelfile",
    "evaluation results.csv",
    "übersicht.txt",
    "n" * 251 + ".txt",
    "vocab.bpe",
    "settings.json/inner.txt",
    "CONFIG.JSON",
]
LEFT_OUT = {
    "model.fp16.safetensors": "weights",
    "consolidated.safetensors": "weights",
    "consolidated.safetensors.index.json": "weights",
    "pytorch_model.bin": "weights",
    "pytorch_model.bin.index.json": "weights",
    "optimizer.pt": "weights",
    "model.Q4_K_M.gguf": "weights",
    "tf_model.h5": "weights",
    "model.onnx.data": "weights",
    "modeling_custom.py": "code",
    "model.safetensors.incomplete": "temporary",
    "tokenizer.json~": "temporary",
    "adapter_config.json": "describes an adapter",
    "params.json": "describes weights in another format",
    "hf_quant_config.json": "describes another quantization",
    ".gitattributes": "hidden",
    ".git/": "hidden",
    ".cache/": "hidden",
    "original/": "the model in another format",
    "onnx/": "the model in another format",
    "checkpoint-500/": "holds other weights",
    "old.work/": "an unfinished conversion",
    "__pycache__/": "written by another program",
    "training_args.bin": "weights",
    "rng_state.pth": "weights",
    "config.json.bak": "temporary",
    "bwla_report.json": "written by the conversion",
    "module/.git/": "hidden",
    "README.md": "written by the conversion",
}
INSIDE = {
    ".git/": ["HEAD", "objects/12/34"],
    "module/.git/": ["HEAD"],
    ".cache/": ["huggingface/download/config.json.metadata"],
    "original/": ["consolidated.00.pth", "tokenizer.model", "params.json"],
    "onnx/": ["model.onnx", "notes.txt"],
    "checkpoint-500/": ["model.safetensors", "config.json", "trainer_state.json"],
    "old.work/": ["manifest.json", "checkpoint/config.json"],
    "__pycache__/": ["modeling.cpython-311.pyc"],
}


def write(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}" if name.endswith("json") else f"the contents of {name}", encoding="utf-8")


def fill(folder: Path) -> None:
    """Write all files of the lists into a model's folder."""
    for name in KEPT:
        write(folder, name)
    for name in LEFT_OUT:
        for inner in INSIDE.get(name, [""]):
            write(folder, name + inner)


@pytest.fixture(scope="module")
def converted(few_rounds: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Summary]:
    """A folder with all of these files, its conversion and the summary."""
    from benchmarks.common.tiny_models import write_model

    parent = tmp_path_factory.mktemp("beside")
    model = write_model(parent / "model", "Qwen3")
    fill(model)
    (model / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_custom.Custom", None]}, "pad_token": "é"})
    )
    (model / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"A": "owner/name--module.Class"}})
    )
    config = read_json(model / "config.json")
    (model / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_custom.Custom"}})
    )
    summary = convert(Options(str(model), parent / "out", rank=1, text_samples=0, recipe="data-free"))
    return model, parent / "out", summary


@pytest.mark.parametrize("name", KEPT)
def test_files_beside_the_weights_are_copied(converted: tuple[Path, Path, Summary], name: str) -> None:
    model, out, _ = converted
    if name == "tokenizer_config.json":
        assert read_json(out / name) == {"pad_token": "é"}
    else:
        assert (out / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_files_beside_the_weights_are_left_out_for_a_reason(
    converted: tuple[Path, Path, Summary], name: str
) -> None:
    model, out, _ = converted
    assert files_beside(model).left_out[name] == LEFT_OUT[name]
    assert name in ("README.md", "bwla_report.json") or not (out / name).exists()


def test_the_output_names_no_code_that_it_lacks(converted: tuple[Path, Path, Summary]) -> None:
    _, out, _ = converted
    assert "auto_map" not in read_json(out / "config.json")
    assert read_json(out / "preprocessor_config.json")["auto_map"] == {"A": "owner/name--module.Class"}


def test_the_summary_says_what_is_not_copied(converted: tuple[Path, Path, Summary]) -> None:
    note = converted[2].notes[-1]
    assert note.startswith("not copied: ")
    assert "adapter_config.json (describes an adapter)" in note
    assert "more" in note
    assert "safetensors" not in note


def test_nested_files_are_hashed(converted: tuple[Path, Path, Summary], tmp_path: Path) -> None:
    _, out, _ = converted
    verdict = check_hashes(out)
    assert verdict is not None
    assert verdict.intact
    assert {"assets/deep/figure.png", "2_Dense/model.safetensors"} <= {*verdict.checked}
    assert read_json(out / "bwla_hashes.json")["files"].keys() == {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()
    } - {"bwla_hashes.json", "bwla_report.json", "bwla_report.html"}


def test_a_dequantized_model_has_them_too(converted: tuple[Path, Path, Summary], tmp_path: Path) -> None:
    write_dequantized(converted[1], tmp_path / "plain")
    for name in KEPT:
        assert (tmp_path / "plain" / name).is_file(), name


def in_a_cache(model: Path) -> None:
    """Turn a folder into a snapshot of the Hub's cache: links to blobs, in folders that may not be written to."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        blob = blobs / str(number)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
        blob.chmod(0o444)
    for folder in (model, *(path for path in model.rglob("*") if path.is_dir())):
        folder.chmod(0o555)


def linked_folder(model: Path) -> None:
    (model / "additional_chat_templates").rename(model.parent / "elsewhere")
    (model / "additional_chat_templates").symlink_to("../elsewhere")


def circle(model: Path) -> None:
    (model / "assets" / "again").symlink_to("..")


def other_weights_linked(model: Path) -> None:
    (model / "model.bin").symlink_to("/nowhere")


def pipe(model: Path) -> None:
    os.mkfifo(model / "pipe")


def open_socket(model: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(model / "pipe"))


def device(model: Path) -> None:
    (model / "pipe").symlink_to("/dev/zero")


def hidden_link_to_nothing(model: Path) -> None:
    (model / ".cache").symlink_to("/nowhere")


def name_that_is_not_unicode(model: Path) -> None:
    (model / os.fsdecode(b"caf\xe9.txt")).write_text("x")


CHANGES = [
    in_a_cache,
    linked_folder,
    circle,
    other_weights_linked,
    pipe,
    open_socket,
    device,
    hidden_link_to_nothing,
    name_that_is_not_unicode,
]


@pytest.mark.parametrize("change", CHANGES)
def test_links_and_special_files_beside_the_weights(
    make_model, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    model = make_model()
    for name in KEPT:
        write(model, name)
    change(model)
    out = tmp_path / "out"
    convert(Options(str(model), out, rank=1, text_samples=0, recipe="data-free"))
    for name in KEPT:
        assert (out / name).is_file(), name
        assert not (out / name).is_symlink()
        assert os.access(out / name, os.W_OK)
    assert not (out / "pipe").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/rag.jinja", "NOTICE"])
def test_a_broken_link_beside_the_weights_is_refused(make_model, tmp_path: Path, name: str) -> None:
    model = make_model()
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("/no/such/file")
    with pytest.raises(SourceError, match=rf"{name}: expected a file, found a link that cannot be followed"):
        convert(Options(str(model), tmp_path / "out", recipe="data-free"))
    assert not (tmp_path / "out.work").exists()


def test_an_output_inside_of_the_model_is_not_copied_into_itself(make_model) -> None:
    model = make_model()
    convert(Options(str(model), model / "out", rank=1, text_samples=0, recipe="data-free"))
    convert(Options(str(model), model / "second", rank=1, text_samples=0, recipe="data-free"))
    assert not (model / "second" / "out").exists()
    assert not (model / "second" / "second.work").exists()


@pytest.mark.parametrize(
    ("name", "size", "kept"),
    [
        ("tokenizer.json", 40 * 10**6, True),
        ("train.parquet", LARGE + 1, False),
        ("images.zip", 3 * 10**9, False),
        ("notes/small.parquet", 10, True),
    ],
)
def test_large_files_beside_the_weights_are_left_out(name: str, size: int, kept: bool) -> None:
    selection = select_files({name: size})
    assert (selection.kept == [name]) == kept
    assert kept or selection.left_out == {name: "larger than 100 MB"}


def test_their_bytes_are_part_of_the_disk_space(make_model) -> None:
    model = make_model()
    before = beside_bytes(model)
    (model / "tekken.json").write_text("x" * 1000)
    (model / "model.bin").write_text("x" * 1000)
    assert beside_bytes(model) == before + 1000
