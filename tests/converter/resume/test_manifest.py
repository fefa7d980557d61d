"""The manifest: it reads back as written, and differences of inputs are explained in one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
from bwla_converter.options import Calibration, LinearReport, Options
from bwla_converter.resume.manifest import (
    VERSION,
    Inputs,
    LayerRecord,
    LayerReport,
    Manifest,
    StateFile,
    StoredFile,
    WorkError,
    arguments_of,
    difference,
    read_manifest,
    write_manifest,
)
from pydantic import ValidationError

INPUTS = Inputs(
    arguments={"--rank": 2, "--ignore": []},
    code={"torch": "2.11", "sources": "a"},
    machine={"threads": "4", "processor": "x"},
    calibration={"sha256": "0"},
)


def manifest() -> Manifest:
    report = LayerReport(
        linears=[LinearReport("model.layers.0.q_proj", 64, 0.25, 0.9)],
        traces={"model.layers.0.q_proj": {"okt": [1.5, 1.25]}},
        statistics={"weights": {"model.layers.0.q_proj": {"before": {}}}},
    )
    state = [StateFile(file="after-00000.hidden", sha256="1", tensor="hidden", shape=[2, 3])]
    record = LayerRecord(shard=StoredFile(file="model-1.safetensors", sha256="2"), report=report, state=state)
    return Manifest(version=VERSION, inputs=INPUTS, layers={"0": record}, seconds=1.5)


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_manifest(tmp_path / "manifest.json", manifest())
    assert read_manifest(tmp_path / "manifest.json") == manifest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_records_cannot_be_changed_and_have_no_other_fields() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest().layers["0"].report.linears = []
    with pytest.raises(ValidationError, match="extra"):
        LayerReport(linears=[], traces={}, losses={})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"version": 1}', f"expected version {VERSION}, found 1"),
        (f'{{"version": {VERSION}}}', "inputs: Field required"),
    ],
)
def test_damaged_and_older_manifests_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(WorkError, match=rf"manifest\.json: {message}.*add --restart"):
        read_manifest(tmp_path / "manifest.json")


def test_arguments_are_named_by_flag_and_leave_out_what_does_not_matter() -> None:
    options = Options("model", Path("out"), rank=2, calibration=Calibration("text.txt", 8, 64))
    arguments = arguments_of(options, {"revision": "abc"})
    assert arguments["--rank"] == 2
    assert arguments["--abits"] is None
    assert arguments["--bits"] is None
    assert arguments["--num-calibration-samples"] == 8
    assert arguments["--max-seq-length"] == 64
    assert arguments["--ignore"] == []
    assert arguments["revision"] == "abc"
    others = replace(
        options, model="elsewhere", out=Path("there"), overwrite=True, report=False, max_memory=1
    )
    assert arguments_of(others, {"revision": "abc"}) == arguments


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, None),
        (
            {"arguments": {"--rank": None, "--ignore": []}},
            "it was started with --rank 2, now it is not given: give the same arguments",
        ),
        (
            {"arguments": {"--rank": 2, "--ignore": ["a", "b"]}},
            "it was started with --ignore not given, now it is a b",
        ),
        ({"code": {"torch": "2.12", "sources": "a"}}, "it was started with torch 2.11, found 2.12: install"),
        ({"code": {"torch": "2.11", "sources": "b"}}, "bwla's own code has changed"),
        ({"machine": {"threads": "8", "processor": "x"}}, "add --threads 4"),
        ({"machine": {"threads": "4", "processor": "y"}}, "resume it on the same machine"),
        ({"calibration": {"sha256": "1"}}, "another calibration text (sha256 0, now 1): give the same text"),
    ],
)
def test_a_difference_is_explained(changes: dict, sentence: str | None) -> None:
    reason = difference(INPUTS, INPUTS.model_copy(update=changes))
    assert reason == sentence if sentence is None else sentence in str(reason)
