"""The documents of a checkpoint, written from plain data."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from bwla_converter.checkpoint.integrity import check_hashes
from bwla_converter.options import LinearReport, Options, Summary
from bwla_converter.quantize.group import GroupResult
from bwla_converter.report.data import PAGE_FILE, REPORT_FILE
from bwla_converter.report.write import group_statistics, write_documents
from bwla_converter.source.model import open_source
from paths import EXAMPLE

TENSORS = {
    "rotation_left": torch.eye(4).unsqueeze(0),
    "rotation_right": torch.eye(8).unsqueeze(0),
    "column_scale": torch.full((32,), 2.0),
}


def test_statistics_of_weights_and_inputs() -> None:
    weights = {"a.q_proj": torch.randn(6, 32), "a.k_proj": torch.randn(3, 32)}
    result = GroupResult(
        dict.fromkeys(weights, TENSORS), dict.fromkeys(weights, 0.1), inputs=torch.randn(5, 32)
    )
    statistics = group_statistics(weights, result)
    assert list(statistics["weights"]) == ["a.q_proj", "a.k_proj"]
    assert list(statistics["activations"]) == ["a.q_proj"]
    # The identity with a constant column scale changes no figure.
    for change in (*statistics["weights"].values(), *statistics["activations"].values()):
        assert change["before"] == change["after"]
    assert json.loads(json.dumps(statistics)) == statistics


@pytest.mark.parametrize("report", [False, True])
def test_all_documents_are_written_and_hashed_last(example_bwla: Path, tmp_path: Path, report: bool) -> None:
    folder = Path(shutil.copytree(example_bwla, tmp_path / "out"))
    for file in (REPORT_FILE, PAGE_FILE, "README.md", "bwla_hashes.json"):
        (folder / file).unlink()
    before = json.loads((example_bwla / REPORT_FILE).read_text())
    linears = [LinearReport(**linear) for linear in before["linears"]]
    figures = {key: before[key] for key in asdict(Summary(*[0] * 9)) if key not in ("out", "linears")}
    options = Options(
        str(EXAMPLE), folder, report=report, text_samples=0, hub_repo="me/model", recipe="data-free"
    )
    half = len(before["traces"]) // 2
    traces = [dict(list(before["traces"].items())[:half]), dict(list(before["traces"].items())[half:])]
    write_documents(
        folder,
        open_source(str(EXAMPLE)),
        options,
        Summary(out=str(folder), linears=linears, **figures),
        traces,
        [before["statistics"], {}],
    )
    after = json.loads((folder / REPORT_FILE).read_text())
    for key in ("linears", "traces", "statistics", "bits", "bytes", "seconds"):
        assert after[key] == before[key]
    assert (folder / PAGE_FILE).exists() is report
    assert str(tmp_path) not in (folder / REPORT_FILE).read_text()
    assert "vllm serve me/model" in (folder / "README.md").read_text()
    verdict = check_hashes(folder)
    assert verdict is not None
    assert verdict.intact
    assert not verdict.added
