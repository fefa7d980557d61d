"""A disk that is full or read-only: one sentence with the folder, the space that is needed, and --resume."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bwla_converter.calibration import activations
from bwla_converter.checkpoint import merge, writer
from bwla_converter.checkpoint.dequantize import write_dequantized
from bwla_converter.checkpoint.dummy import write_dummy
from bwla_converter.checkpoint.writer import OutputError
from bwla_converter.cli.convert import app
from bwla_converter.common import atomic_files
from bwla_converter.common.write_errors import write_error
from bwla_converter.options import Options
from bwla_converter.pipeline import convert
from bwla_converter.resume import work_folder
from bwla_converter.resume.work_folder import work_path
from bwla_converter.source import gguf_folder
from bwla_kernels.errors import BWLAError, SourceError
from safetensors import SafetensorError
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("few_rounds")

SENTENCE = (
    r"^{parent}: out could not be written there \(.*: {reason}\): expected [\d.]+ .*B of free disk space in a writable "
    r"folder, found [\d.]+ .*B: {advice}, then add --resume to the same command to continue$"
)
REASONS = {
    errno.ENOSPC: ("No space left on device", "free some disk space"),
    errno.EDQUOT: ("Disk quota exceeded", "free some disk space"),
    errno.EFBIG: ("File too large", "free some disk space"),
    errno.EROFS: ("Read-only file system", "make the folder writable"),
    errno.EACCES: ("Permission denied", "make the folder writable"),
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("bwla_report")
    }


def os_error(number: int, path: object = None) -> OSError:
    return OSError(number, os.strerror(number), *([] if path is None else [str(path)]))


def serialization_error(number: int, path: object = None) -> SafetensorError:
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


Failing = Callable[..., Any]


def on(module: Any, name: str, part: str, number: int, error: Callable[..., Exception] = os_error) -> Failing:
    """Return a function that lets `module.name` fail with `error` for paths that contain `part`."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = getattr(module, name)

        def failing(*args: Any, **more: Any) -> Any:
            paths = [str(value) for value in args if isinstance(value, str | Path)]
            if matching := [path for path in paths if part in path]:
                raise error(number, matching[0])
            return plain(*args, **more)

        monkeypatch.setattr(module, name, failing)

    return install


def fsync_of_nothing(number: int) -> Failing:
    """Return a function that lets the third flush to disk fail, as on network file systems."""

    def install(monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def failing(handle: int) -> None:
            calls.append(handle)
            if len(calls) == 7:
                raise os_error(number)

        monkeypatch.setattr(atomic_files.os, "fsync", failing)

    return install


@pytest.mark.parametrize(
    ("number", "install"),
    [
        (errno.ENOSPC, on(writer, "save_file", "part-00002", errno.ENOSPC, serialization_error)),
        (errno.EDQUOT, on(writer, "save_file", "part-00001", errno.EDQUOT, serialization_error)),
        (errno.EROFS, on(writer, "save_file", "part-00003", errno.EROFS, serialization_error)),
        (errno.ENOSPC, on(Path, "write_text", "manifest.json", errno.ENOSPC)),
        (errno.EDQUOT, on(Path, "write_text", "config.json", errno.EDQUOT)),
        (errno.ENOSPC, on(Path, "write_text", "bwla_report.html", errno.ENOSPC)),
        (errno.EROFS, on(Path, "write_text", "bwla_hashes.json", errno.EROFS)),
        (errno.ENOSPC, on(shutil, "copyfile", "generation_config.json", errno.ENOSPC)),
        (errno.EROFS, on(Path, "mkdir", "out.work", errno.EROFS)),
        (errno.EACCES, on(Path, "rename", "out.work/checkpoint", errno.EACCES)),
        (errno.EACCES, on(Path, "touch", "part-00002", errno.EACCES)),
        (errno.EDQUOT, fsync_of_nothing(errno.EDQUOT)),
    ],
)
def test_a_full_or_read_only_disk_in_the_middle(
    make_model, tmp_path: Path, number: int, install: Callable[[pytest.MonkeyPatch], None]
) -> None:
    options = Options(str(make_model()), tmp_path / "out", rank=1, text_samples=0, recipe="data-free")
    convert(replace(options, out=tmp_path / "whole"))
    reason, advice = REASONS[number]
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        with pytest.raises(OutputError, match=SENTENCE.format(parent=tmp_path, reason=reason, advice=advice)):
            convert(options)
    assert not options.out.exists()
    convert(replace(options, resume=True))
    assert contents(options.out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]


@pytest.mark.parametrize("files", [1, 4])
def test_a_disk_that_is_full_while_the_parts_are_merged(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    options = Options(
        str(make_model(num_hidden_layers=3)), tmp_path / "out", rank=1, text_samples=0, recipe="data-free"
    )
    if files > 1:
        monkeypatch.setattr(merge, "MAX_FILE_BYTES", 25_000)
    convert(replace(options, out=tmp_path / "whole"))
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) == files
    for shard in shards:
        with pytest.MonkeyPatch.context() as patch:
            on(writer, "merge_files", shard.name, errno.ENOSPC)(patch)
            with pytest.raises(OutputError, match=r"No space left on device.*--resume"):
                convert(replace(options, resume=True))
    convert(replace(options, resume=True))
    assert contents(options.out) == contents(tmp_path / "whole")


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """Let no process of this test write a file of more than `num_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [0, 500, 5_000, 12_000, 20_000, 40_000])
def test_a_limit_on_the_size_of_files(make_model, tmp_path: Path, num_bytes: int) -> None:
    """A real error of the operating system, in whichever file is the first to exceed the limit."""
    options = Options(str(make_model()), tmp_path / "out", rank=1, text_samples=0, recipe="data-free")
    convert(replace(options, out=tmp_path / "whole"))
    reason, advice = REASONS[errno.EFBIG]
    with (
        limited(num_bytes),
        pytest.raises(OutputError, match=SENTENCE.format(parent=tmp_path, reason=reason, advice=advice)),
    ):
        convert(options)
    convert(replace(options, resume=True))
    assert contents(options.out) == contents(tmp_path / "whole")


def test_the_sentence_ends_the_command(make_model, tmp_path: Path) -> None:
    model = make_model()
    with limited(20_000):
        result = CliRunner().invoke(app, [str(model), str(tmp_path / "out"), "--recipe", "data-free"])
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert last.endswith("--resume to the same command to continue")


@pytest.mark.parametrize(
    "write",
    [
        lambda whole, options: write_dequantized(whole, options.out),
        lambda whole, options: write_dummy(options),
    ],
)
def test_other_outputs_on_a_full_disk(
    make_model, tmp_path: Path, write: Callable[[Path, Options], object]
) -> None:
    options = Options(str(make_model()), tmp_path / "out", rank=1, text_samples=0, recipe="data-free")
    convert(replace(options, out=tmp_path / "whole"))
    with (
        limited(5_000),
        pytest.raises(OutputError, match=r"out could not .*, then run the same command again"),
    ):
        write(tmp_path / "whole", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "whole"]


def test_a_gguf_file_on_a_full_disk(make_gguf, tmp_path: Path) -> None:
    file = make_gguf()
    with (
        limited(5_000),
        pytest.raises(SourceError, match=r"File too large.*: free some disk space.*BWLA_CACHE"),
    ):
        gguf_folder.prepare(file)


def test_the_folders_above_the_output_are_created(make_model, tmp_path: Path) -> None:
    options = Options(
        str(make_model()), tmp_path / "a" / "b" / "out", rank=1, text_samples=0, recipe="data-free"
    )
    with limited(500), pytest.raises(OutputError):
        convert(options)
    assert not (tmp_path / "a").exists()
    convert(options)
    assert (options.out / "config.json").is_file()
    write_dummy(replace(options, out=tmp_path / "c" / "d" / "out"))
    write_dequantized(options.out, tmp_path / "e" / "f" / "out")
    assert (tmp_path / "e" / "f" / "out" / "config.json").is_file()


@pytest.mark.parametrize("above", [True, False])
def test_a_read_only_folder_is_refused_before_work(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: bool
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o555)
    if os.geteuid() == 0:  # who may write anywhere
        plain = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and plain(path, mode))
    out = place / "new" / "out" if above else place / "out"
    with pytest.raises(
        OutputError, match=f"^{place}: expected a writable folder for out, found one that may not"
    ):
        convert(Options(str(make_model()), out, recipe="data-free"))
    assert list(place.iterdir()) == []


def test_a_file_above_the_output_is_refused_before_work(make_model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file: expected a writable folder for out, found a file"):
        convert(Options(str(make_model()), tmp_path / "file" / "out", recipe="data-free"))


@pytest.mark.parametrize("name", ["n" * 251, "n" * 300, "ü" * 126, "n" * 256 + "/out"])
def test_a_name_that_is_too_long_is_refused_before_work(make_model, tmp_path: Path, name: str) -> None:
    """The name of the work folder is the longer one; names are counted in bytes."""
    with pytest.raises(OutputError, match=r"expected a name of at most 250 bytes .*: choose a shorter name$"):
        convert(Options(str(make_model()), tmp_path / name, recipe="data-free"))


def test_the_longest_name(make_model, tmp_path: Path) -> None:
    out = tmp_path / ("n" * 250)
    convert(Options(str(make_model()), out, rank=0, text_samples=0, recipe="data-free"))
    assert (out / "model.safetensors").is_file()


def test_a_work_folder_that_may_not_be_written_to(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(str(make_model()), tmp_path / "out", rank=1, recipe="data-free")
    work_path(options.out).mkdir()
    on(Path, "open", "lock", errno.EACCES)(monkeypatch)
    with pytest.raises(BWLAError, match=r"lock: .*found: Permission denied: make the folder writable"):
        convert(options)


def test_errors_of_reading_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    here = tmp_path / "out" / "file"
    assert write_error(os_error(errno.EACCES, "/model/tokenizer.json"), here) is None
    assert write_error(os_error(errno.ENOENT, here), here) is None
    assert write_error(RuntimeError("no"), here) is None
    error = write_error(SafetensorError("something else"), here)
    assert error is not None
    assert error.reason == "something else"


def test_hidden_states_on_a_full_disk(tmp_path: Path) -> None:
    import torch

    store = activations.ActivationStore(tmp_path / "states")
    with limited(100), pytest.raises(OSError, match="File too large") as error:
        store.keep(torch.Size((4, 8, 8)), iter(torch.ones(4, 1, 8, 8)))
    assert write_error(error.value, tmp_path) is not None


def test_a_work_folder_is_kept_on_a_disk_that_became_read_only(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing it fails too then; the first error is the one to show."""
    monkeypatch.setattr(
        work_folder, "remove_work", lambda path: (_ for _ in ()).throw(os_error(errno.EROFS, path))
    )
    on(writer, "save_file", "part-00001", errno.EROFS, serialization_error)(monkeypatch)
    with pytest.raises(OutputError, match=r"part-00001\.safetensors: Read-only file system"):
        convert(Options(str(make_model()), tmp_path / "out", recipe="data-free"))


def test_the_space_that_is_left_is_named(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(writer, "save_file", "part-00001", errno.ENOSPC, serialization_error)(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_234_000_000))
    with pytest.raises(OutputError, match=r"found 1\.2 GB"):
        convert(Options(str(make_model()), tmp_path / "out", recipe="data-free"))
