"""Interrupted conversions: what is kept, that resuming gives the same bytes, and when it is refused."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bwla_converter import pipeline
from bwla_converter.listener import Listener
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import RecipeFactory, convert
from bwla_converter.quantize import data_free
from bwla_converter.recipes.data_free import DataFreeRecipe
from bwla_converter.resume import fingerprint
from bwla_converter.resume.manifest import WorkError, read_manifest
from bwla_converter.resume.work_folder import MANIFEST, work_path
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.folder import read_folder, read_tensors
from paths import EXAMPLE
from torch import Tensor

pytestmark = pytest.mark.usefixtures("few_rounds")

LAYERS = 3


class StopAfter(Listener):
    """Interrupts after a number of decoder layers, and records the layers and the notes."""

    def __init__(self, num_layers: int | None = None) -> None:
        self.num_layers, self.done, self.notes = num_layers, [], []

    def resumed(self, layers: int, weights: int, notes) -> None:
        self.notes = [f"{layers} layers", *notes]

    def layer_done(self, index: int) -> None:
        self.done.append(index)
        if len(self.done) == self.num_layers:
            raise KeyboardInterrupt


class StatefulDataFree(DataFreeRecipe):
    """`data-free` with a state and a last step: the seed of a layer depends on all layers before it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.total = torch.zeros((), dtype=torch.int64)

    def end_layer(self) -> Mapping[str, Tensor]:
        self.total = self.total * 3 + 1
        self.seed = int(self.total)
        return {}

    def state(self) -> Mapping[str, Tensor]:
        return {"total": self.total}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.total = state["total"]
        self.seed = int(self.total)

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        entries = read_folder(folder)
        names = [name for name in entries if name.endswith("weight_scale")]
        return {name: scale * 2 for name, scale in read_tensors(folder, entries, names).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, without times and memory in the report."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files.pop("bwla_report.html", None)
    report = json.loads(files.pop("bwla_report.json"))
    return files | {"report": json.dumps({**report, "seconds": 0, "memory": 0}).encode()}


@pytest.fixture
def model(make_model) -> Path:
    return make_model(shards=2, num_hidden_layers=LAYERS)


def make_stateful(options: Options, *_: object) -> StatefulDataFree:
    return StatefulDataFree(options.seed)


def interrupted(options: Options, layers: int, recipe_factory: RecipeFactory | None = None) -> Options:
    """Interrupt a conversion after so many layers; return the options to resume it with."""
    with pytest.raises(KeyboardInterrupt):
        convert(options, StopAfter(layers), recipe_factory=recipe_factory)
    assert not options.out.exists()
    assert len(read_manifest(work_path(options.out) / MANIFEST).layers) == layers
    return replace(options, resume=True)


@pytest.mark.parametrize("layers", [1, LAYERS])
@pytest.mark.parametrize("factory", [None, make_stateful])
def test_a_resumed_conversion_gives_the_same_bytes(
    model: Path, tmp_path: Path, layers: int, factory: RecipeFactory | None
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Options(str(model), whole, rank=2, recipe="data-free"), recipe_factory=factory)
    again = interrupted(Options(str(model), out, rank=2, recipe="data-free"), layers, factory)
    listener = StopAfter()
    summary = convert(again, listener, recipe_factory=factory)
    assert listener.done == list(range(layers, LAYERS))
    assert listener.notes == [f"{layers} layers"]
    assert contents(out) == contents(whole)
    assert len(summary.linears) == 7 * LAYERS
    assert not work_path(out).exists()


@pytest.mark.parametrize(("recipe", "layers"), [("paper", 1), ("fast", 1), ("fast", 2)])
def test_a_calibrated_recipe_is_resumed_to_the_bit(
    make_model, tmp_path: Path, recipe: str, layers: int
) -> None:
    """Also after its last layer, when the final norm is all that is left to fit."""
    vocabulary = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    model = make_model(vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, model)
    text = tmp_path / "text.txt"
    text.write_text("Some of the words that there are, again and again. " * 40)
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = Options(str(model), out, recipe=recipe, rank=2, calibration=Calibration(str(text), 2, 16))
    convert(replace(options, out=whole))
    again = interrupted(options, layers)
    text.write_text("Other words, just as many of them as before, or so. " * 40)
    with pytest.raises(
        WorkError, match=r"started with another calibration text \(sha256 .*: give the same text"
    ):
        convert(again)
    text.write_text("Some of the words that there are, again and again. " * 40)
    convert(again)
    assert contents(out) == contents(whole)


def test_the_previous_model_is_kept_until_the_new_one_is_complete(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(Options(str(model), out, rank=1, recipe="data-free"))
    before = contents(out)
    options = Options(str(model), out, rank=2, overwrite=True, recipe="data-free")
    with pytest.raises(KeyboardInterrupt):
        convert(options, StopAfter(1))
    assert contents(out) == before
    with pytest.raises(BWLAError, match="already exists: choose another output or add --overwrite"):
        convert(replace(options, overwrite=False, resume=True))
    convert(replace(options, resume=True))
    assert contents(out) != before


def test_an_unfinished_conversion_is_resumed_or_discarded_only_on_request(
    model: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = Options(str(model), out, rank=2, seed=1, recipe="data-free")
    convert(replace(options, out=whole))
    interrupted(replace(options, seed=5), 1)
    sentence = r"out\.work: holds an unfinished conversion \(1 layers done\): add --resume .* or --restart"
    with pytest.raises(WorkError, match=sentence):
        convert(options)
    with pytest.raises(WorkError, match="exclude each other"):
        convert(replace(options, resume=True, restart=True))
    convert(replace(options, restart=True))
    assert contents(out) == contents(whole)
    assert not work_path(out).exists()


def test_resume_without_a_work_folder_starts_a_conversion(model: Path, tmp_path: Path) -> None:
    convert(Options(str(model), tmp_path / "out", rank=2, resume=True, recipe="data-free"))
    assert (tmp_path / "out" / "config.json").is_file()


def change_source(model: Path, _: pytest.MonkeyPatch, again: Options) -> Options:
    spoil(model / "model-00001-of-00003.safetensors")
    return again


def change_code(_: Path, monkeypatch: pytest.MonkeyPatch, again: Options) -> Options:
    before = fingerprint.code_version()
    monkeypatch.setattr(pipeline, "code_version", lambda: {**before, "sources": "0" * 64})
    return again


def change_torch(_: Path, monkeypatch: pytest.MonkeyPatch, again: Options) -> Options:
    before = fingerprint.code_version()
    monkeypatch.setattr(pipeline, "code_version", lambda: {**before, "torch": "9.9"})
    return again


def change_threads(_: Path, monkeypatch: pytest.MonkeyPatch, again: Options) -> Options:
    return replace(again, threads=2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda *all_: replace(all_[2], rank=3),
            "it was started with --rank 2, now it is 3: give the same arguments",
        ),
        (lambda *all_: replace(all_[2], bits=8), "it was started with --abits not given, now it is 8"),
        (
            lambda *all_: replace(all_[2], ignore=("down_proj",)),
            "it was started with --ignore not given, now it is down_proj",
        ),
        (change_source, r"model-00001-of-00003\.safetensors: has changed since .* was started"),
        (change_code, "bwla's own code has changed since it was started: go back to that version"),
        (change_torch, r"started with torch .*, found 9\.9: install that version again"),
        (change_threads, r"started with threads 1, now it is 2, .*: add --threads 1"),
    ],
)
def test_resuming_is_refused_where_the_bytes_would_differ_and_the_work_is_kept(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., Options],
    sentence: str,
) -> None:
    again = interrupted(Options(str(model), tmp_path / "out", rank=2, recipe="data-free"), 1)
    with pytest.raises(WorkError, match=sentence):
        convert(change(model, monkeypatch, again))
    assert len(read_manifest(work_path(again.out) / MANIFEST).layers) == 1


def test_new_modification_times_alone_do_not_prevent_resuming(model: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Options(str(model), whole, rank=2, recipe="data-free"))
    again, listener = interrupted(Options(str(model), out, rank=2, recipe="data-free"), 1), StopAfter()
    for path in model.iterdir():
        os.utime(path)
    convert(again, listener)
    assert listener.done == list(range(1, LAYERS))
    assert contents(out) == contents(whole)


def spoil(path: Path) -> None:
    """Flip the last bit of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["checkpoint/part-00001.safetensors", "checkpoint/part-00002.safetensors"])
def test_a_damaged_layer_alone_is_quantized_again(model: Path, tmp_path: Path, file: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Options(str(model), whole, rank=2, recipe="data-free"))
    again, listener = interrupted(Options(str(model), out, rank=2, recipe="data-free"), 2), StopAfter()
    spoil(work_path(out) / file)
    convert(again, listener)
    number = int(file[len("checkpoint/part-") :][:5]) - 1
    assert listener.done == [number, 2]
    assert listener.notes[1:] == [f"layer {number}: its shard {Path(file).name} is damaged or missing"]
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("file", "first"),
    [
        ("states/after-00001.safetensors", 1),
        ("checkpoint/part-00002.safetensors", 1),
        ("checkpoint/part-00001.safetensors", 0),
    ],
)
def test_with_a_state_all_layers_after_the_damage_are_quantized_again(
    model: Path, tmp_path: Path, file: str, first: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert(Options(str(model), whole, rank=2, recipe="data-free"), recipe_factory=make_stateful)
    again, listener = (
        interrupted(Options(str(model), out, rank=2, recipe="data-free"), 2, make_stateful),
        StopAfter(),
    )
    (work_path(out) / file).unlink()
    convert(again, listener, recipe_factory=make_stateful)
    assert listener.done == list(range(first, LAYERS))
    assert "damaged or missing" in listener.notes[1]
    assert contents(out) == contents(whole)


def test_no_more_than_two_states_are_kept(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(Options(str(model), out, rank=2, recipe="data-free"), LAYERS, make_stateful)
    states = sorted(path.name for path in (work_path(out) / "states").iterdir())
    assert states == ["after-00001.safetensors", "after-00002.safetensors"]


def test_a_damaged_manifest_is_refused_with_its_name(model: Path, tmp_path: Path) -> None:
    again = interrupted(Options(str(model), tmp_path / "out", rank=2, recipe="data-free"), 1)
    file = work_path(again.out) / MANIFEST
    data = json.loads(file.read_text())
    for broken in ("{", json.dumps({**data, "version": 99}), json.dumps({**data, "seconds": "many"})):
        file.write_text(broken)
        with pytest.raises(WorkError, match=r"manifest\.json: .*add --restart"):
            convert(again)


def test_two_conversions_cannot_write_to_one_output(model: Path, tmp_path: Path) -> None:
    again = interrupted(Options(str(model), tmp_path / "out", rank=2, recipe="data-free"), 1)
    with (work_path(again.out) / "lock").open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(WorkError, match="another bwla-convert is writing here"):
            convert(again)
    convert(again)


def test_a_folder_with_other_files_is_left_alone(model: Path, tmp_path: Path) -> None:
    strange = tmp_path / "out.work" / "thesis.txt"
    strange.parent.mkdir()
    strange.write_text("all of it")
    for resume in (False, True):
        with pytest.raises(
            WorkError, match=r"expected a work folder of bwla-convert, found thesis\.txt: move it away"
        ):
            convert(
                Options(str(model), tmp_path / "out", resume=resume, restart=not resume, recipe="data-free")
            )
    assert strange.read_text() == "all of it"


def test_a_failure_before_the_first_finished_layer_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("at once")

    monkeypatch.setattr(data_free, "quantize_group", failing)
    with pytest.raises(RuntimeError):
        convert(Options(str(model), tmp_path / "out", recipe="data-free"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_source_that_changes_during_the_conversion_is_noticed(model: Path, tmp_path: Path) -> None:
    class Meddler(Listener):
        def layer_started(self, index: int) -> None:
            if index == 1:
                spoil(model / "config.json")

    with pytest.raises(WorkError, match=r"config\.json: has changed since"):
        convert(Options(str(model), tmp_path / "out", recipe="data-free"), Meddler())
    assert len(read_manifest(work_path(tmp_path / "out") / MANIFEST).layers) == 1
