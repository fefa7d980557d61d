"""Hidden states in memory and in files: the same numbers either way, no file left behind."""

import gc
from pathlib import Path

import pytest
import torch
from bwla_converter.calibration.activations import ActivationStore, StoredStates
from torch import Tensor


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path / "activations" if request.param == "disk" else None)


def samples() -> Tensor:
    return torch.arange(5 * 3 * 4, dtype=torch.float32).view(5, 3, 4).sin()


def test_parts_are_what_was_kept(store: ActivationStore) -> None:
    kept = store.keep(samples().shape, samples().split(2))
    assert len(kept) == 5
    assert kept.shape == (5, 3, 4)
    assert [len(part) for part in kept.split(2)] == [2, 2, 1]
    assert torch.equal(torch.cat(list(kept.split(2))), samples())
    assert torch.equal(kept[torch.tensor([3, 0, 3])], samples()[[3, 0, 3]])
    assert kept.mean_square() == pytest.approx(float(samples().square().mean()))


def test_a_map_leaves_the_original(store: ActivationStore) -> None:
    kept = store.keep(samples().shape, [samples()])
    doubled = kept.map(lambda part: part * 2, 2)
    assert torch.equal(torch.cat(list(doubled.split(5))), samples() * 2)
    assert torch.equal(torch.cat(list(kept.split(5))), samples())


def test_what_is_written_down_outlives_the_store(store: ActivationStore, tmp_path: Path) -> None:
    kept = store.keep(samples().shape, [samples()])
    stored = kept.stored()
    if isinstance(stored, StoredStates):
        stored.link_to(tmp_path / "state.f32")
        stored = StoredStates(tmp_path / "state.f32", stored.shape)
    del kept
    gc.collect()
    for other in (store, ActivationStore(), ActivationStore(tmp_path / "other")):
        assert torch.equal(torch.cat(list(other.take(stored).split(2))), samples())


def test_files_go_with_their_owners(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path)
    kept = store.keep(samples().shape, [samples()])
    assert len(list(tmp_path.iterdir())) == 1
    kept = kept.map(lambda part: part, 1)
    gc.collect()
    assert len(list(tmp_path.iterdir())) == 1
    del kept
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_noticed(tmp_path: Path) -> None:
    kept = ActivationStore(tmp_path).keep(samples().shape, [samples()])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(OSError, match="expected 48 bytes of hidden states, found 44"):
        list(kept.split(1))
