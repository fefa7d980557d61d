"""Conversions are measured in processes of their own, beside libraries that may be missing."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter.options import Calibration
from bwla_converter.source.model import open_source
from paths import CALIBRATION_TEXT, EXAMPLE
from safetensors.torch import load_file

from benchmarks.common.processes import RunError, run
from benchmarks.conversion import peers, speed, speed_convert
from benchmarks.conversion.peers import Peer
from benchmarks.conversion.speed import Job, find_group_size, measure, quantize_with_peer
from benchmarks.conversion.speed_models import make_model, write_first_layers
from benchmarks.conversion.speed_phases import PHASES


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("example", open_source(str(EXAMPLE)), Calibration(str(CALIBRATION_TEXT), 2, 16), 1, tmp_path)


def test_the_first_layers_of_a_model_are_those_of_the_whole(tmp_path: Path) -> None:
    whole, part = (
        open_source(str(EXAMPLE)),
        open_source(str(write_first_layers(EXAMPLE, 1, tmp_path / "part"))),
    )
    assert part.num_layers == 1 < whole.num_layers
    assert {*part.entries} == {*whole.names_outside_layers(), *whole.names_of_layer(0)}
    name = f"{whole.linears_of_layer(0)[0]}.weight"
    assert torch.equal(part.read([name])[name], whole.read([name])[name])


def test_a_folder_is_used_as_it_is_unless_layers_are_asked_for(tmp_path: Path) -> None:
    assert make_model(str(EXAMPLE), None, tmp_path / "model") == EXAMPLE


def test_a_random_model_has_the_shape_of_its_name(tmp_path: Path) -> None:
    source = open_source(str(make_model("qwen3-0.6b", 1, tmp_path / "model")))
    assert source.num_layers == 1
    assert source.entries["model.layers.0.self_attn.q_proj.weight"].shape == (2048, 1024)
    assert source.entries["model.layers.0.self_attn.k_proj.weight"].shape == (1024, 1024)


def test_the_group_size_divides_all_widths(job: Job, make_model: Any) -> None:
    assert find_group_size(job.source) == 64
    narrow = open_source(str(make_model(hidden_size=96)))
    assert find_group_size(narrow) == 32


def test_a_command_gets_its_threads_and_returns_its_result(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    code = f"import json, os; json.dump(os.environ['OMP_NUM_THREADS'], open({str(result)!r}, 'w'))"
    assert run([sys.executable, "-c", code], result, 3, tmp_path) == "3"


@pytest.mark.parametrize(
    ("code", "message"),
    [("print('one'); raise SystemExit('two')", "exit status 1: two"), ("pass", "exit status 0: no output")],
)
def test_a_command_without_a_result_has_failed(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        run([sys.executable, "-c", code], tmp_path / "result.json", 1, tmp_path)


def test_a_library_that_fails_is_recorded_and_the_others_run(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_for_the_first(command: list[str | Path], *_: object) -> dict[str, Any]:
        if "gptqmodel-gptq" in command:
            raise RunError("exit status 1: no module")
        return {"seconds": 1.0}

    monkeypatch.setattr(speed, "run", fails_for_the_first)
    methods = ["gptqmodel-gptq", "autoround-light"]
    failed, row = measure(job, methods, dict.fromkeys(methods, Path("python")))
    assert failed == {"model": "example", "method": "gptqmodel-gptq", "error": "exit status 1: no module"}
    assert (row["method"], row["seconds"], row["tokens"], row["group_size"]) == (
        "autoround-light",
        1.0,
        32,
        64,
    )


def test_a_library_gets_the_samples_of_our_conversion(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "run", lambda *_: {})
    quantize_with_peer(job, "autoround-light", Path("python"))
    expected, _ = speed.calibration_samples(job.calibration, job.source.folder, 0)
    assert torch.equal(load_file(job.folder / "ids.safetensors")["ids"], expected)


@pytest.fixture
def fake_peer(job: Job, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Path]:
    """Return `fake_peer(run)`, which sets the command line of peers.py for a method `run`, and returns its result."""

    def install(quantize: Callable[[], object]) -> Path:
        monkeypatch.setattr(speed, "run", lambda *_: {})
        quantize_with_peer(job, "autoround-light", Path("python"))
        monkeypatch.setattr(peers, "PEERS", {"fake": Peer("safetensors", lambda _: quantize)})
        ids, result = job.folder / "ids.safetensors", job.folder / "fake.json"
        threads = str(torch.get_num_threads())
        words = ["peers.py", str(result), "fake", "model", str(ids), "4", "64", threads]
        monkeypatch.setattr(sys, "argv", words)
        return result

    return install


def test_a_peer_writes_what_it_cost_and_its_versions(fake_peer: Callable[..., Path]) -> None:
    runs: list[int] = []
    result = fake_peer(lambda: runs.append(1))
    peers.main()
    measured = json.loads(result.read_text())
    assert runs == [1]
    assert measured["peak_gb"] > 0
    assert measured["versions"].keys() == {"safetensors", "torch", "transformers"}


def test_a_peer_that_fails_gives_its_version_and_error_in_one_line(fake_peer: Callable[..., Path]) -> None:
    def fail() -> None:
        raise ValueError("no\nGPU")

    result = fake_peer(fail)
    with pytest.raises(SystemExit, match=r"^safetensors [\d.]+: ValueError: no GPU$"):
        peers.main()
    assert not result.exists()


def test_conversions_pass_through_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_first_layers(EXAMPLE, 1, tmp_path / "model")
    text = [
        "--calibration",
        str(CALIBRATION_TEXT),
        "--num-calibration-samples",
        "2",
        "--max-seq-length",
        "16",
    ]
    found: set[str] = set()
    for recipe, options in (
        ("data-free", ["--samples-of-text", "1"]),
        ("best", [*text, "--tune-epochs", "1", "--distill-epochs", "1", "--lm-head-bits", "8"]),
    ):
        result = tmp_path / f"{recipe}.json"
        arguments = [str(result), str(model), str(tmp_path / recipe), "--recipe", recipe, *options]
        monkeypatch.setattr(sys, "argv", ["speed_convert", *arguments])
        assert speed_convert.main() == 0
        measured = json.loads(result.read_text())
        assert measured["weights"] > 0
        found |= measured["phases"].keys()
    named = {phase for phase in PHASES.values() if isinstance(phase, str)}
    assert found >= {*named, "text through the original layers", "text through the quantized layers"}
