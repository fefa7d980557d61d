"""The work folder: its lock, its states, and which finished layers can be kept."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from bwla_converter.resume.manifest import Inputs, LayerReport, WorkError
from bwla_converter.resume.work_folder import (
    CHECKPOINT,
    LOCK,
    MANIFEST,
    STATES,
    WorkFolder,
    check_work,
    open_work,
    work_path,
)

INPUTS = Inputs(arguments={}, code={}, machine={}, calibration={})
REPORT = LayerReport(linears=[], traces={})


def commit(work: WorkFolder, index: int, with_state: bool = False) -> None:
    file = f"model-{index}.safetensors"
    work.writer.write_shard(file, {f"w{index}": torch.full((2,), float(index))})
    work.commit_layer(index, file, {"x": torch.tensor([index])} if with_state else {}, REPORT)


def interrupted(out: Path, layers: int, with_state: bool = False) -> Path:
    """Leave a work folder with finished layers behind; return it."""
    with suppress(KeyboardInterrupt), open_work(out, INPUTS) as work:
        for index in range(layers):
            commit(work, index, with_state)
        raise KeyboardInterrupt
    return work_path(out)


def test_finished_layers_survive_an_interruption(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, 3, with_state=True)
    with open_work(out, INPUTS) as work:
        assert sorted(work.records) == [0, 1, 2]
        assert work.find_damaged_layers() == {}
        assert work.load_state(2)["x"].tolist() == [2]
        assert sorted(path.name for path in (work.path / STATES).iterdir()) == [
            "after-00001.safetensors",
            "after-00002.safetensors",
        ]


def test_looking_for_damage_changes_nothing_and_discarding_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = interrupted(out, 3)
    (path / CHECKPOINT / "model-1.safetensors").unlink()
    before = (path / MANIFEST).read_bytes()
    with open_work(out, INPUTS) as work:
        assert work.find_damaged_layers() == {1: "its shard model-1.safetensors is damaged or missing"}
        assert (path / MANIFEST).read_bytes() == before
        work.discard_damaged_layers()
        assert sorted(work.records) == [0, 2]
        assert work.notes == ["layer 1: its shard model-1.safetensors is damaged or missing"]
    assert (path / MANIFEST).read_bytes() != before


@pytest.mark.parametrize(
    ("file", "kept", "notes"),
    [
        ("states/after-00002.safetensors", [0, 1], ["layer 2: its state is damaged or missing"]),
        (
            "checkpoint/model-2.safetensors",
            [0, 1],
            ["layer 2: its shard model-2.safetensors is damaged or missing"],
        ),
        # The state before layer 1 is not kept, so that nothing can be resumed.
        (
            "checkpoint/model-1.safetensors",
            [],
            ["layer 1: its shard model-1.safetensors is damaged or missing"],
        ),
    ],
)
def test_with_states_only_layers_up_to_an_intact_state_are_kept(
    tmp_path: Path, file: str, kept: list[int], notes: list[str]
) -> None:
    out = tmp_path / "out"
    path = interrupted(out, 3, with_state=True)
    (path / file).unlink()
    with open_work(out, INPUTS) as work:
        work.discard_damaged_layers()
        assert sorted(work.records) == kept
        assert work.notes == notes


def test_the_lock_excludes_a_second_process_and_is_released(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, 1)
    with open_work(out, INPUTS):
        with pytest.raises(WorkError, match="another bwla-convert is writing here"):
            check_work(out, resume=True, restart=False)
        with pytest.raises(WorkError, match="another bwla-convert is writing here"), open_work(out, INPUTS):
            pass
    assert check_work(out, resume=True, restart=False)


def test_a_lock_file_that_was_replaced_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bwla_converter.resume import work_folder

    class Replacing(work_folder.FileLock):
        """Replaces the lock file between opening the folder and locking it."""

        def acquire(self, *args, **options):
            Path(self.lock_file).unlink()
            Path(self.lock_file).touch()
            return super().acquire(*args, **options)

    out = tmp_path / "out"
    interrupted(out, 1)
    monkeypatch.setattr(work_folder, "FileLock", Replacing)
    with pytest.raises(WorkError, match="another bwla-convert has just finished here: try again"):
        check_work(out, resume=True, restart=False)


def test_without_a_finished_layer_nothing_is_left(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", 0)
    assert list(tmp_path.iterdir()) == []


def test_replacements_and_publishing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_work(out, INPUTS) as work:
        commit(work, 0)
        assert not work.apply_replacements()
        work.replace({"w0": torch.ones(2)})
        assert work.apply_replacements()
        assert not work.is_published()
        work.publish()
    assert [path.name for path in out.iterdir()] == ["model-0.safetensors"]
    assert not work_path(out).exists()


def test_a_restart_restores_the_output_that_was_being_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = interrupted(out, 1)
    (path / "replaced").mkdir()
    (path / "replaced" / "config.json").write_text("{}")
    with pytest.raises(KeyboardInterrupt), open_work(out, INPUTS, restart=True):
        raise KeyboardInterrupt
    assert (out / "config.json").read_text() == "{}"


def test_what_check_work_answers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not check_work(out, resume=True, restart=False)
    path = work_path(out)
    path.mkdir()
    (path / LOCK).touch()
    assert not check_work(out, resume=False, restart=False)
    (path / "thesis.txt").touch()
    with pytest.raises(WorkError, match=r"found thesis\.txt"):
        check_work(out, resume=False, restart=True)
