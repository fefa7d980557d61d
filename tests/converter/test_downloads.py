"""Hub downloads: only what a conversion needs of a repository, and readable errors."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bwla_converter.source.folder import download as module
from bwla_converter.source.folder.download import download, needed_files
from bwla_converter.source.folder.locate import locate
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import INDEX_FILE
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

PLAIN = ["README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SHARDS = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize(
    ("others", "needed"),
    [
        (["consolidated.safetensors", "params.json", "tekken.json"], ["tekken.json"]),
        (["consolidated-00001-of-00002.safetensors", "consolidated.safetensors.index.json"], []),
        (["original/consolidated.00.pth", "original/tokenizer.model", "original/params.json"], []),
        (["pytorch_model.bin", "pytorch_model.bin.index.json", "rust_model.ot"], []),
        (["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"], []),
        (["model.safetensors.index.fp16.json", "model.bf16.safetensors"], []),
        (["model-Q4_K_M.gguf", "gguf/model-Q8_0.gguf"], []),
        (["onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_q4.onnx", "onnx/config.json"], []),
        (["tf_model.h5", "flax_model.msgpack", "flax_model.msgpack.index.json"], []),
        (["coreml/model.mlpackage/Data/weights/weight.bin", "openvino/openvino_model.bin"], []),
        (["adapter_config.json", "adapter_model.safetensors"], []),
        (["checkpoint-100/model.safetensors", "checkpoint-100/config.json", "checkpoint-100/merges.txt"], []),
        (["modeling_custom.py", ".gitattributes", "optimizer.pt", "training_args.bin"], []),
        (["LICENSE", "USE_POLICY.md", "additional_chat_templates/rag.jinja"], None),
        (["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"], None),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_downloads_hold_what_is_needed_and_nothing_else(
    others: list[str], needed: list[str] | None, sharded: bool
) -> None:
    weights = [INDEX_FILE, *SHARDS] if sharded else ["model.safetensors"]
    sizes = dict.fromkeys([*PLAIN, *weights, *others], 1)
    found = needed_files(sizes, lambda: dict(zip("ab", SHARDS, strict=True)))
    assert found == sorted([*PLAIN, *weights, *(others if needed is None else needed)])


def test_downloads_take_the_files_that_the_index_names() -> None:
    sizes = dict.fromkeys(["config.json", INDEX_FILE, "weights_1.safetensors", "weights_2.safetensors"], 1)
    assert "weights_2.safetensors" not in needed_files(sizes, lambda: {"a": "weights_1.safetensors"})


def test_large_files_are_not_downloaded() -> None:
    sizes = {"config.json": 1, "model.safetensors": 10**10, "train.parquet": 10**9, "tokenizer.json": 10**7}
    assert needed_files(sizes, dict) == ["config.json", "model.safetensors", "tokenizer.json"]


class FakeHub:
    """A repository, and what is downloaded of it into a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, files: Mapping[str, str]) -> None:
        self.folder, self.files = folder / ("c" * 40), files
        self.error: Exception | None = None
        monkeypatch.setattr(module, "HfApi", lambda: self)
        monkeypatch.setattr(module, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(module, "hf_hub_download", self.hf_hub_download)

    def model_info(self, model: str, files_metadata: bool) -> Any:
        if self.error is not None:
            raise self.error
        assert files_metadata
        siblings = [SimpleNamespace(rfilename=name, size=len(text)) for name, text in self.files.items()]
        return SimpleNamespace(siblings=siblings, sha="c" * 40)

    def hf_hub_download(self, model: str, file: str, revision: str) -> str:
        assert revision == "c" * 40
        self.snapshot_download(model, revision=revision, allow_patterns=[file])
        return str(self.folder / file)

    def snapshot_download(
        self, model: str, revision: str = "", allow_patterns: Any = None, local_files_only: bool = False
    ) -> str:
        if local_files_only:
            if not self.folder.exists():
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.folder)
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(self.files[name])
        return str(self.folder)


INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})


def test_downloads_from_a_fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*PLAIN, *SHARDS, "odd[1]*.txt", "original/model.pth", "model.fp16.safetensors", "a/b.jinja"]
    hub = FakeHub(monkeypatch, tmp_path, {INDEX_FILE: INDEX, **dict.fromkeys(names, "")})
    folder, revision = locate("owner/name")
    assert (folder, revision) == (hub.folder, "c" * 40)
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*PLAIN, *SHARDS, INDEX_FILE, "odd[1]*.txt", "a/b.jinja"}
    hub.error = OfflineModeIsEnabled("offline")
    assert locate("owner/name") == (hub.folder, "c" * 40)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["config.json", "pytorch_model.bin"], "found pytorch_model.bin, which is pickled"),
        (["adapter_config.json", "adapter_model.safetensors"], "expected a model, found an adapter"),
        (["config.json", "consolidated.safetensors"], "their maker's own format"),
        (["model_index.json", "unet/config.json"], "a diffusers pipeline"),
        (["model-Q4_0.gguf"], "hf download owner/name FILE.gguf"),
        (["config.json", "model.fp16.safetensors"], "found model.fp16.safetensors"),
        (
            ["config.json", INDEX_FILE, "model.safetensors"],
            "found both, and the index does not list the file",
        ),
        ([], "found no files"),
    ],
)
def test_downloads_of_something_else_are_refused_before_any_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], sentence: str
) -> None:
    hub = FakeHub(monkeypatch, tmp_path, {name: INDEX if name == INDEX_FILE else "" for name in names})
    with pytest.raises(SourceError, match=f"^owner/name: .*{sentence}") as error:
        download("owner/name")
    assert "\n" not in str(error.value)
    assert not list(hub.folder.glob("*.safetensors")) + list(hub.folder.glob("*.bin"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OfflineModeIsEnabled("the Hub is off"), r"owner/name: .*failed \(the Hub is off\): check the name"),
        (ConnectionError("no route"), r"owner/name: .*failed \(no route\)"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "free some disk space, or name another folder in HF_HUB",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded: free some disk space"),
    ],
)
def test_downloads_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    hub = FakeHub(monkeypatch, tmp_path, {})
    hub.error = error
    with pytest.raises(SourceError, match=sentence):
        download("owner/name")
