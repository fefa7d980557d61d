"""A conversion without a calibration text: the model writes its own, which is kept beside the report."""

import json
from pathlib import Path

import pytest
import torch
from bwla_converter.conversion import CPU_SAMPLES, CUDA_SAMPLES, with_amounts, with_calibration
from bwla_converter.listener import Listener
from bwla_converter.options import SELF, Calibration, Options
from bwla_converter.pipeline import convert
from bwla_converter.source.model import open_source
from bwla_kernels.errors import SourceError
from paths import EXAMPLE


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BWLA_CACHE", str(tmp_path / "cache"))


def options(out: Path, **changes: object) -> Options:
    return Options(
        str(EXAMPLE),
        out,
        rank=1,
        calibration=Calibration(SELF, 6, 64),
        report=False,
        text_samples=0,
        **changes,
    )  # type: ignore[arg-type]


class StopAfterOneLayer(Listener):
    def layer_done(self, index: int) -> None:
        raise KeyboardInterrupt


def test_the_text_is_kept_beside_the_report_and_can_be_used_again(tmp_path: Path) -> None:
    summary = convert(options(tmp_path / "out"))
    assert summary.measured_loss is not None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    calibration = config["quantization_config"]["provenance"]["calibration"]
    assert (calibration["source"], calibration["samples"], calibration["length"]) == (SELF, 6, 64)
    lines = (tmp_path / "out" / "bwla_calibration.jsonl").read_text().splitlines()
    assert len(lines) == 6 + 6
    assert all(json.loads(line)["text"] for line in lines)


def test_a_resumed_conversion_has_the_same_bytes(tmp_path: Path) -> None:
    convert(options(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        convert(options(tmp_path / "out"), StopAfterOneLayer())
    convert(options(tmp_path / "out", resume=True))
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert shards
    assert all((tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes() for shard in shards)


def test_defaults_by_device_and_model() -> None:
    source = open_source(str(EXAMPLE))
    plain = with_calibration(Options(str(EXAMPLE), Path("out")))
    assert plain.calibration == Calibration(SELF)
    for device, (samples, length) in (("cpu", CPU_SAMPLES), ("cuda", CUDA_SAMPLES)):
        amounts = with_amounts(plain, source, torch.device(device)).calibration
        assert amounts == Calibration(SELF, samples, min(length, 1024)), "the example has 1,024 positions"
    given = with_amounts(
        Options("model", Path("out"), calibration=Calibration("text", 3)), source, torch.device("cpu")
    )
    assert given.calibration == Calibration("text", 3, CPU_SAMPLES[1])
    assert with_calibration(Options("model", Path("out"), recipe="data-free")).calibration is None
    explicit = Options("model", Path("out"), recipe="data-free", calibration=Calibration(SELF))
    assert with_calibration(explicit).calibration is None, "the model writes no text that nobody reads"


def test_a_model_without_a_tokenizer_is_refused_before_work(make_model, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected the model's tokenizer"):
        convert(Options(str(make_model()), tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["model"]
