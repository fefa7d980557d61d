"""What the output is like: one file or numbered ones, readable by whom the umask lets, and described truthfully."""

import json
import os
from pathlib import Path

import pytest
from bwla_converter.checkpoint import merge
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.checkpoint.dummy import write_dummy
from bwla_converter.checkpoint.integrity import check_hashes
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.source.gguf_folder import prepare
from bwla_kernels.format.files import INDEX_FILE
from bwla_kernels.format.folder import check_folder


def weights(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_the_output_is_one_file_below_5_gb(make_model, tmp_path: Path) -> None:
    options = Options(str(make_model(shards=3)), tmp_path / "out", rank=1, text_samples=0, recipe="data-free")
    convert(options)
    write_dummy(Options(options.model, tmp_path / "dummy", rank=1, recipe="data-free"))
    write_dequantized(options.out, tmp_path / "plain")
    for name in ("out", "dummy", "plain"):
        assert weights(tmp_path / name) == ["model.safetensors"]
        assert not (tmp_path / name / INDEX_FILE).exists()


def test_the_output_is_numbered_files_above(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "MAX_FILE_BYTES", 25_000)
    options = Options(
        str(make_model(num_hidden_layers=4)), tmp_path / "out", rank=1, text_samples=0, recipe="data-free"
    )
    convert(options)
    files = weights(options.out)
    assert files == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    assert len(files) > 1
    sizes = [(options.out / file).stat().st_size for file in files]
    assert all(size < 25_000 + 10_000 for size in sizes)  # with the headers
    index = json.loads((options.out / INDEX_FILE).read_text())
    assert sorted(set(index["weight_map"].values())) == files
    check_folder(options.out)
    verdict = check_hashes(options.out)
    assert verdict is not None
    assert verdict.intact


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_the_output_has_the_permissions_that_the_umask_gives(make_model, tmp_path: Path, mask: int) -> None:
    model = make_model()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("")
    for path in model.rglob("*"):
        path.chmod(0o500 if path.is_dir() else 0o400)
    before = os.umask(mask)
    try:
        convert(Options(str(model), tmp_path / "out", rank=1, text_samples=0, recipe="data-free"))
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == expected, path


def test_the_folder_of_a_gguf_file_has_the_permissions_that_the_umask_gives(make_gguf) -> None:
    before = os.umask(0o027)
    try:
        folder = prepare(make_gguf())
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.safetensors")} == {0o640}
