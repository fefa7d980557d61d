"""Several processes on one conversion: the same model as from one, within rounding."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bwla_converter.calibration.distributed import Ranks, join_ranks, start_ranks
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import unpack_signs
from bwla_kernels.format.folder import read_folder, read_tensors
from paths import EXAMPLE


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 3), (2, 4)])
def test_windows_are_shared_out_once_and_evenly(count: int, size: int) -> None:
    parts = [Ranks(rank, size).part_of(count) for rank in range(size)]
    assert [index for part in parts for index in range(count)[part]] == list(range(count))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_one_process_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    start_ranks(1)
    assert join_ranks("paper", torch.device("cpu"), 8) == Ranks(0, 1)
    assert Ranks().share([True, False]) == [True, False]


def test_a_recipe_without_text_has_nothing_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        BWLAError, match="recipe 'paper': expected fast where several processes share the work"
    ):
        join_ranks("paper", torch.device("cpu"), 8)


def test_every_process_needs_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(BWLAError, match="a window of text for each process, found --samples 3"):
        join_ranks("fast", torch.device("cpu"), 3)


@pytest.mark.slow
def test_two_processes_make_the_model_of_one(make_model, tmp_path: Path) -> None:
    """The first group agrees to rounding. From there on a rounded code may fall on the other side of a tie, and what is
    learned then takes another, equally good way: layers' errors agree to a few percent, their mean closer."""
    model = make_model(vocab_size=json.loads((EXAMPLE / "config.json").read_text())["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, model)
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLE.parent / "text" / "calibration.txt").read_text()[:20000])
    flags = [
        "--recipe",
        "fast",
        "--rank",
        "2",
        "--calibration",
        str(text),
        "--samples",
        "7",
        "--length",
        "32",
    ]
    flags += ["--device", "cpu", "--samples-of-text", "0", "--clip", "1.0"]
    reports, stored = [], []
    for count in (1, 2):
        out = tmp_path / f"out-{count}"
        command = [sys.executable, "-m", "bwla_converter", str(model), str(out), *flags, "--gpus", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads((out / "bwla_report.json").read_text()))
        entries = read_folder(out)
        stored.append(read_tensors(out, entries, list(entries)))
    one, two = ([layer["error"] for layer in report["layers"]] for report in reports)
    assert two == pytest.approx(one, rel=0.1)
    assert sum(two) == pytest.approx(sum(one), rel=0.02)
    assert stored[0].keys() == stored[1].keys()
    for name in stored[0]:
        if name.startswith("model.layers.0.self_attn.q_proj"):
            # A sum in another order may end the search for a row's signs elsewhere.
            here, there = stored[0][name], stored[1][name]
            if name.endswith("weight_packed"):
                assert (unpack_signs(here) != unpack_signs(there)).float().mean() < 1e-2
            else:
                assert (here.float() - there.float()).norm() <= 2e-2 * here.float().norm(), name
