"""Folders that are written from GGUF files: complete or not at all, once for each file, and ready to be converted."""

import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from bwla_converter.listener import Listener
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.report.model_card import source_metadata
from bwla_converter.source import gguf_folder
from bwla_converter.source.folder import download
from bwla_converter.source.folder.locate import locate
from bwla_converter.source.gguf_folder import prepare, write_folder
from bwla_converter.source.gguf_path import cache_folder
from bwla_converter.source.model import check_values, open_source
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import read_json
from safetensors.torch import load_file


def folders_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "gguf").iterdir() if not path.name.endswith(".lock"))


def test_each_decoder_layer_is_in_a_file_of_its_own(make_gguf, tmp_path: Path) -> None:
    write_folder(make_gguf("Llama"), tmp_path / "folder")
    contents = [set(load_file(path)) for path in sorted((tmp_path / "folder").glob("*.safetensors"))]
    assert len(contents) == 5
    layers = [names for names in contents if any(name.startswith("model.layers.") for name in names)]
    assert [len(names) for names in layers] == [9, 9]
    check_values(open_source(str(tmp_path / "folder")))


def test_a_large_decoder_layer_is_divided(make_gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_gguf("Llama")
    write_folder(file, tmp_path / "whole")
    monkeypatch.setattr(gguf_folder, "SHARD_BYTES", 50_000)
    write_folder(file, tmp_path / "divided")
    whole, divided = (
        [load_file(path) for path in sorted((tmp_path / name).glob("*.safetensors"))]
        for name in ("whole", "divided")
    )
    assert len(divided) > len(whole)
    expected = {name: tensor for tensors in whole for name, tensor in tensors.items()}
    found = {name: tensor for tensors in divided for name, tensor in tensors.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    check_values(open_source(str(tmp_path / "divided")))


def test_a_file_is_read_once(make_gguf, cache: Path) -> None:
    file, calls = make_gguf(), []

    def on_progress(folder: Path, done: int, total: int) -> None:
        calls.append((folder, done, total))

    folder = prepare(file, on_progress)
    assert folder.parent == cache / "gguf"
    assert folder.name.startswith("model-")
    total = calls[0][2]
    assert calls[0] == (folder, 0, total)
    assert calls[-1] == (folder, total, total)
    assert total == sum(
        tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(path).values()
    )
    calls.clear()
    assert prepare(file, on_progress) == folder
    assert calls == []
    assert folders_in(cache) == [folder.name]


def test_a_changed_file_is_read_again(make_gguf, cache: Path) -> None:
    file = make_gguf("Llama")
    first = prepare(file)
    os.utime(file, ns=(0, 10**18))
    second = prepare(file)
    assert folders_in(cache) == sorted([first.name, second.name])
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_several_at_a_time_write_one_folder(make_gguf, cache: Path) -> None:
    file, writers, found = make_gguf(), [], []

    def run() -> None:
        found.append(prepare(file, lambda folder, done, total: writers.append(threading.get_ident())))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == len(set(writers)) == 1
    assert folders_in(cache) == [found[0].name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device")])
def test_an_interrupted_folder_is_written_from_the_start(make_gguf, cache: Path, error) -> None:
    file = make_gguf()

    def interrupt(folder: Path, done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        prepare(file, interrupt)
    assert folders_in(cache) == []
    check_values(open_source(str(prepare(file))))


def test_leftovers_of_a_killed_process_are_removed(make_gguf, cache: Path) -> None:
    file = make_gguf()
    folder = prepare(file)
    leftover = folder.with_name(f".{folder.name}.partial")
    shutil.move(folder, leftover)
    (leftover / "model-00009-of-00009.safetensors").write_text("half a file")
    assert prepare(file) == folder
    assert folders_in(cache) == [folder.name]
    assert not (folder / "model-00009-of-00009.safetensors").exists()


def test_too_little_disk_space(make_gguf, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=60_000_000)
    monkeypatch.setattr(gguf_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        SourceError, match=r"0.1 GB of free disk space for model.gguf in bfloat16, found 0.1 GB"
    ):
        prepare(make_gguf())
    assert folders_in(cache) == []


def test_a_cache_that_cannot_be_written(make_gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="cannot be written .*: name another folder in BWLA_CACHE"):
        prepare(make_gguf())


def test_an_existing_folder_is_left_alone(make_gguf, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match="folder: already exists"):
        write_folder(make_gguf(), tmp_path / "folder")


def test_the_cache_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BWLA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/bwla")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "bwla"


def test_a_folder_of_gguf_files_is_refused_with_one_of_them(make_gguf) -> None:
    file = make_gguf()
    with pytest.raises(SourceError, match=rf"expected a config.json, found GGUF files: .*{file}"):
        locate(str(file.parent))


def test_a_gguf_file_that_does_not_exist_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(SourceError, match="models/model.gguf: there is no such file"):
        locate("models/model.gguf")


def test_a_repository_of_gguf_files_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name, size=1) for name in ("README.md", "model.Q4_0.gguf")]
    hub = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=files, sha="0"))
    monkeypatch.setattr(download, "HfApi", lambda: hub)
    with pytest.raises(SourceError, match="hf download owner/name-GGUF FILE.gguf --local-dir ."):
        locate("owner/name-GGUF")


def test_generation_ends_with_the_turn(make_gguf, tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)

    write_folder(make_gguf(extra=extra), tmp_path / "folder")
    found = read_json(tmp_path / "folder" / "generation_config.json")
    assert found == {"bos_token_id": 1, "eos_token_id": [2, 7]}


def test_the_licence_reaches_the_model_card(make_gguf, tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_license("apache-2.0")
        writer.add_languages(["en", "de"])

    write_folder(make_gguf(extra=extra), tmp_path / "folder")
    assert source_metadata(tmp_path / "folder") == {"license": "apache-2.0", "language": ["en", "de"]}


def test_a_conversion_from_a_gguf_file_is_that_of_its_folder(make_gguf, tmp_path: Path) -> None:
    file = make_gguf("Llama", quantization="Q8_0")
    convert(Options(str(file), tmp_path / "from-file", rank=2, recipe="data-free"))
    convert(Options(str(prepare(file)), tmp_path / "from-folder", rank=2, recipe="data-free"))
    for path in (tmp_path / "from-folder").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "from-file" / path.name).read_bytes()
    config = json.loads((tmp_path / "from-file" / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["base_model"] == "model.gguf"


class StopAfterFirstLayer(Listener):
    """Records the progress of the preparation and stops the conversion after its first layer."""

    def __init__(self) -> None:
        self.prepared: list[int] = []

    def dequantized(self, folder: Path, done: int, total: int) -> None:
        self.prepared.append(done)

    def layer_done(self, index: int) -> None:
        raise KeyboardInterrupt


def test_a_conversion_is_resumed_even_if_the_cache_was_emptied(
    make_gguf, cache: Path, tmp_path: Path
) -> None:
    file, listener = make_gguf("Llama"), StopAfterFirstLayer()
    convert(Options(str(file), tmp_path / "whole", rank=2, recipe="data-free"))
    shutil.rmtree(cache)
    with pytest.raises(KeyboardInterrupt):
        convert(Options(str(file), tmp_path / "out", rank=2, recipe="data-free"), listener)
    assert listener.prepared[0] == 0
    shutil.rmtree(cache)
    convert(Options(str(file), tmp_path / "out", rank=2, resume=True, recipe="data-free"))
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_weights_that_are_not_finite_are_refused(make_gguf, tmp_path: Path) -> None:
    weight = torch.full((64, 128), torch.nan).numpy()
    with pytest.raises(SourceError, match="mlp.down_proj.weight: expected finite values"):
        convert(
            Options(
                str(make_gguf(changes={"blk.1.ffn_down.weight": weight})),
                tmp_path / "out",
                recipe="data-free",
            )
        )
