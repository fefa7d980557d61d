"""Loss against bits per weight: rows of several runs are merged, and the bits of other libraries are counted."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bwla_converter import BWLAError, Summary
from bwla_converter.evaluation.perplexity import perplexity
from bwla_converter.options import Calibration
from paths import CALIBRATION_TEXT, EXAMPLE, HELDOUT_TEXT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.common.processes import RunError
from benchmarks.conversion import peers
from benchmarks.conversion.peers import PEERS, Peer, Task, count_levels
from benchmarks.quality import frontier
from benchmarks.quality.frontier import Job, merge, parse_arguments, read_earlier
from scripts import plot_results
from scripts.tables import quality, results

GROUP = 32
WINDOWS = torch.arange(3 * 16).view(3, 16)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    calibration = Calibration(str(CALIBRATION_TEXT), 2, 16)
    return Job("example", EXAMPLE, calibration, WINDOWS, 20.0, 1, (1, 2), tmp_path)


def row(method: str, seed: int = 0, **entries: Any) -> dict[str, Any]:
    fields = {"model": "example", "method": method, "abits": 16, "seed": seed, "bits": 2.0, "ppl": 40.0}
    return {**fields, "ppl_original": 20.0, "d": math.log(2), "seconds": 1.0, "command": "python", **entries}


@pytest.mark.parametrize(
    ("method", "bits", "group_size", "expected"),
    [
        ("llmcompressor-gptq", 2, 64, 2.25),  # a 16-bit scale
        ("llmcompressor-gptq-asym", 2, 64, 2 + 18 / 64),  # and a zero point of two bits
        ("llmcompressor-gptq-asym", 4, 32, 4 + 20 / 32),
        ("autoround-light", 3, 32, 3.5),
        ("hqq", 1, 64, 1.5),  # a 16-bit scale and a 16-bit zero point
    ],
)
def test_scales_and_zero_points_are_counted(method: str, bits: int, group_size: int, expected: float) -> None:
    assert PEERS[method].bits_per_weight(bits, group_size) == expected


@pytest.mark.parametrize("entry", frontier.KEY)
def test_a_row_replaces_the_one_of_the_same_variant_only(entry: str) -> None:
    first, second = row("fast", target_bits=2.2), row("hqq", code_bits=2, group_size=64)
    again = {**first, "ppl": 30.0}
    assert merge([first, second], again) == [again, second]
    other = {**first, entry: 7}
    assert merge([first, second], other) == [first, second, other]


def test_earlier_rows_have_the_same_settings(tmp_path: Path) -> None:
    out = tmp_path / "frontier.json"
    assert read_earlier(out, {}) == read_earlier(None, {}) == ([], [])
    result = {"calibration": {"samples": 64}, "rows": [row("hqq")], "unavailable": [{"method": "fast"}]}
    out.write_text(json.dumps(result))
    assert read_earlier(out, {"calibration": {"samples": 64}}) == ([row("hqq")], [{"method": "fast"}])
    with pytest.raises(BWLAError, match="calibration.*'samples': 8.*found.*'samples': 64"):
        read_earlier(out, {"calibration": {"samples": 8}})


def test_the_command_line_names_variants() -> None:
    words = "--methods best,hqq --bits auto,2.2 --abits 6,16 --seeds 1 --peer-bits 2 --group-sizes 64,32"
    arguments = parse_arguments([*words.split(), "--peer-python", "hqq=/peer/python"])
    ours = list(frontier.variants_of("best", arguments))
    assert [(each["target_bits"], each["abits"], each["seed"]) for each in ours] == [
        (None, 6, 1),
        (None, 16, 1),
        (2.2, 6, 1),
        (2.2, 16, 1),
    ]
    theirs = list(frontier.variants_of("hqq", arguments))
    assert [(each["code_bits"], each["group_size"], each["abits"]) for each in theirs] == [
        (2, 64, 16),
        (2, 32, 16),
    ]
    assert arguments.pythons == {"hqq": Path("/peer/python")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods hqq", "expected --peer-python METHOD=PYTHON for hqq, found none"),
        (
            "--methods gptqmodel-gptq",
            "expected data-free, paper, fast, best, .* as a method, found gptqmodel-gptq",
        ),
        ("--seeds one", "expected numbers, joined by commas"),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(words.split())
    assert re.search(message, capsys.readouterr().err)


def test_our_row_has_the_bits_and_the_prediction_of_the_summary(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def convert(options: Any) -> Summary:
        given.append(options)
        return Summary(str(options.out), 0, 0, 2.19876, 1, 1, 1, 5.0, [], predicted_loss=0.4)

    monkeypatch.setattr(frontier, "convert", convert)
    monkeypatch.setattr(frontier, "measure_perplexity", lambda *_: 30.0)
    measured = frontier.convert_with(job, "best", 2.2, 8, 3)
    (options,) = given
    assert (options.target_bits, options.bits, options.seed, options.threads) == (2.2, 8, 3, 1)
    assert (options.tune_epochs, options.distill_epochs, options.calibration) == (1, 2, job.calibration)
    command = measured.pop("command")
    assert command.startswith("python")
    assert measured == {
        "model": "example",
        "method": "best",
        "target_bits": 2.2,
        "bits": 2.1988,
        "abits": 8,
        "ppl": 30.0,
        "ppl_original": 20.0,
        "d": math.log(1.5),
        "seconds": 5.0,
        "seed": 3,
        "predicted": 0.4,
    }


def test_a_peer_gets_the_samples_of_the_seed_and_the_windows(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[Any], *_: object) -> dict[str, Any]:
        commands.append([str(part) for part in command])
        return {"ppl": 40.0, "seconds": 2.0, "versions": {"hqq": "1"}}

    monkeypatch.setattr(frontier, "run", run)
    variant = {"method": "hqq", "code_bits": 2, "group_size": 64, "abits": 16, "seed": 1}
    measured = frontier.quantize_with_peer(job, variant, Path("python"))
    assert commands[0][4:6] == ["hqq", str(EXAMPLE)]
    assert commands[0][-3:] == ["2", "64", "1"]
    tensors = load_file(commands[0][6])
    assert torch.equal(tensors["windows"], WINDOWS)
    assert torch.equal(tensors["ids"], frontier.calibration_samples(job.calibration, EXAMPLE, 1)[0])
    assert (measured["bits"], measured["d"], measured["group_size"]) == (2.5, math.log(2), 64)
    assert measured["versions"] == {"hqq": "1"}


def test_a_method_that_fails_is_listed_until_it_succeeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "frontier.json"
    words = f"frontier --model {EXAMPLE} --methods hqq --peer-python hqq=python --peer-bits 2,3 --out {out}"
    calibration = "--num-calibration-samples 2 --max-seq-length 16 --window 32 --limit 2 --threads 1"
    monkeypatch.setattr(sys, "argv", [*words.split(), *calibration.split()])

    def fail(job: Job, variant: dict[str, Any], _: Path) -> dict[str, Any]:
        if variant["code_bits"] == 2:
            raise RunError("no module")
        return job.row(variant, 40.0, bits=3.5, seconds=1.0)

    monkeypatch.setattr(frontier, "quantize_with_peer", fail)
    assert frontier.main() == 0
    result = json.loads(out.read_text())
    assert [(each["code_bits"], each["ppl"]) for each in result["rows"]] == [(3, 40.0)]
    assert [(each["code_bits"], each["error"]) for each in result["unavailable"]] == [(2, "no module")]
    assert result["evaluation"] == {"source": HELDOUT_TEXT.name, "window": 32, "windows": 2}

    succeed = lambda job, variant, _: job.row(variant, 50.0, bits=2.5, seconds=1.0)  # noqa: E731
    monkeypatch.setattr(frontier, "quantize_with_peer", succeed)
    monkeypatch.setattr(sys, "argv", [word if word != "2,3" else "2" for word in sys.argv])
    assert frontier.main() == 0
    result = json.loads(out.read_text())
    assert [(each["code_bits"], each["ppl"]) for each in result["rows"]] == [(3, 40.0), (2, 50.0)]
    assert result["unavailable"] == []


def test_other_settings_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "frontier.json"
    out.write_text(json.dumps({"rows": [], "unavailable": []}))
    monkeypatch.setattr(frontier, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(
        sys, "argv", ["frontier", "--model", str(EXAMPLE), "--window", "32", "--out", str(out)]
    )
    assert frontier.main() == 2
    assert "expected rows with the calibration" in capsys.readouterr().err


@pytest.fixture
def run_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], Path]:
    """Return `run_peer(change)`, which runs peers.py on the example, changed by `change`, and returns its result."""

    def run(change: Callable[[Any], None]) -> Path:
        def prepare(task: Task) -> Callable[[], Any]:
            def quantize() -> Any:
                model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
                change(model)
                return model

            return quantize

        samples, result = tmp_path / "samples.safetensors", tmp_path / "peer.json"
        save_file({"ids": WINDOWS.clone(), "windows": WINDOWS.clone()}, samples)
        monkeypatch.setattr(peers, "PEERS", {"fake": Peer("safetensors", prepare)})
        settings = ["2", str(GROUP), str(torch.get_num_threads())]
        monkeypatch.setattr(sys, "argv", ["", str(result), "fake", str(EXAMPLE), str(samples), *settings])
        peers.main()
        return result

    return run


@torch.no_grad()
def round_to_two_bits(model: Any) -> None:
    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, torch.nn.Linear):
            groups = module.weight.view(-1, GROUP)
            scale = groups.abs().amax(1, keepdim=True) / 2
            groups.copy_((groups / scale).round().clamp(-2, 1) * scale)


def test_a_peer_evaluates_as_we_do(run_peer: Callable[[Callable[[Any], None]], Path]) -> None:
    ours = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    round_to_two_bits(ours)
    assert count_levels(ours, GROUP) == 4
    measured = json.loads(run_peer(round_to_two_bits).read_text())
    assert measured["ppl"] == pytest.approx(perplexity(ours, WINDOWS), rel=1e-5)


def test_a_model_that_was_not_quantized_is_no_result(
    run_peer: Callable[[Callable[[Any], None]], Path],
) -> None:
    with pytest.raises(SystemExit, match=r"expected 2 to 4 distinct weights in a group of 32, found 3\d"):
        run_peer(lambda model: None)


def test_the_table_has_a_line_for_each_variant_with_the_mean_of_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = [row("fast", seed, target_bits=2.2, d=0.2 + 0.2 * seed, predicted=0.25) for seed in (0, 1)]
    theirs = [row("hqq", code_bits=bits, group_size=64, bits=bits + 0.5) for bits in (3, 2)]
    (tmp_path / "frontier.json").write_text(json.dumps({"rows": [*theirs, *ours]}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert quality.frontier_table("frontier").splitlines()[2:] == [
        "| example | `fast` | 2.00 | 16 | 40.00 | 0.300 ± 0.141 | 0.250 | 1 | 2 |",
        "| example | HQQ, 2 bits, groups of 64 | 2.50 | 16 | 40.00 | 0.693 |  | 1 | 1 |",
        "| example | HQQ, 3 bits, groups of 64 | 3.50 | 16 | 40.00 | 0.693 |  | 1 | 1 |",
    ]


def test_the_picture_has_a_point_for_each_size_with_a_loss() -> None:
    ours = [row("fast", seed, target_bits=2.2, bits=2.2, d=0.2 + 0.2 * seed) for seed in (0, 1)]
    lossless = row("fast", target_bits=4.2, bits=4.2, d=0.0)
    points = plot_results.curve_points([*ours, lossless, row("hqq", group_size=64, code_bits=2)], None)
    assert points == [(2.2, pytest.approx(0.3))]


def test_every_method_has_a_title_and_a_curve() -> None:
    methods = {*frontier.RECIPES, *frontier.FRONTIER_PEERS}
    assert methods == {*quality.FRONTIER_METHODS}
    assert methods - {"data-free", "paper"} == {*plot_results.CURVES}
