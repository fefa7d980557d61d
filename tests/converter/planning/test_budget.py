"""The prediction before work: what it counts, and that what does not fit is refused with the numbers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from bwla_converter.common.devices import choose_device
from bwla_converter.listener import Listener
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_converter.planning import budget as budget_module
from bwla_converter.planning.budget import BudgetError, Rates, check_budget, parse_size, predict
from bwla_converter.planning.plan import ConversionPlan, make_plan
from bwla_converter.source.model import Source, open_source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.schema import Provenance
from paths import EXAMPLE

RATES = Rates(flops=1e11, bytes=1e10)


@pytest.fixture
def planned(make_model) -> tuple[Source, ConversionPlan]:
    source = open_source(str(make_model()))
    return source, make_plan(source, 2, 6, 1.0, Provenance(base_model="m", recipe="fast", seed=0))


def text(samples: int) -> Calibration:
    return Calibration("text.txt", samples, 128)


def test_more_text_costs_time_disk_and_memory_until_it_is_on_disk(planned) -> None:
    few, many = (predict(*planned, "fast", text(samples), 1e12, RATES) for samples in (8, 80))
    assert few.hidden_in_memory
    assert many.hidden == 10 * few.hidden == 3 * 4 * 80 * 128 * 64
    assert many.seconds > few.seconds
    assert many.disk > few.disk
    assert many.memory > few.memory
    tight = predict(*planned, "fast", text(80), many.memory - many.hidden / 2, RATES)
    assert not tight.hidden_in_memory
    assert tight.memory == pytest.approx(many.memory - many.hidden, rel=0.02)
    assert "on disk" in str(tight)


def test_paper_keeps_no_text(planned) -> None:
    budget = predict(*planned, "paper", None, 1e12, RATES)
    assert budget.hidden == budget.kept == 0
    assert budget.output == planned[1].output_bytes(planned[0])
    assert budget.seconds < predict(*planned, "fast", text(8), 1e12, RATES).seconds


def test_best_counts_what_distillation_trains(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent weight, its gradient and Adam's two moments are 16 bytes."""
    plain = predict(*planned, "best", text(8), 1e12, RATES)
    monkeypatch.setattr(budget_module, "sections", lambda source: [([0], 10**8), ([1], 10**7)])
    large = predict(*planned, "best", text(8), 1e12, RATES)
    assert large.moment == "distillation"
    assert 16e8 < large.work < 17e8 + plain.work
    assert plain.seconds > predict(*planned, "fast", text(8), 1e12, RATES).seconds


def test_too_little_memory_is_refused_with_the_numbers(make_model, tmp_path: Path) -> None:
    options = Options(str(make_model()), tmp_path / "out", rank=2, max_memory=10**7)
    sentence = (
        r"would need [\d.]+ GB of memory \(the most in .*\), found 0\.0 GB to use: .* raise --max-memory"
    )
    with pytest.raises(BudgetError, match=sentence):
        convert(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_too_little_disk_is_refused_with_the_numbers(planned) -> None:
    budget = predict(*planned, "fast", text(8), 1e12, RATES)
    check_budget(budget, 1e12, Path("out"), budget.disk * 1.03)
    with pytest.raises(
        BudgetError, match=r"out: expected 0\.00 GB of free disk space \(output .*, work folder"
    ):
        check_budget(budget, 1e12, Path("out"), budget.disk)


def test_hidden_states_on_disk_give_the_same_bytes(make_model, tmp_path: Path, monkeypatch) -> None:
    model = make_model(vocab_size=json.loads((EXAMPLE / "config.json").read_text())["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, model)
    words = tmp_path / "text.txt"
    words.write_text("Some of the words that there are, again and again. " * 40)
    options = Options(
        str(model), tmp_path / "memory", recipe="fast", rank=2, calibration=Calibration(str(words), 6, 16)
    )
    convert(options)
    plain = budget_module.predict

    def tight(source, plan, recipe, calibration, limit, device):
        return plain(source, plan, recipe, calibration, 0.0, RATES)

    class Stop(Listener):
        def layer_done(self, index: int) -> None:
            assert len(list((tmp_path / "disk.work" / "activations").iterdir())) == 2
            raise KeyboardInterrupt

    monkeypatch.setattr("bwla_converter.pipeline.predict", tight)
    monkeypatch.setattr("bwla_converter.pipeline.check_budget", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        convert(replace(options, out=tmp_path / "disk"), Stop())
    assert sorted(path.name for path in (tmp_path / "disk.work" / "states").iterdir()) == [
        "after-00000.hidden", "after-00000.original_hidden"
    ]  # fmt: skip
    convert(replace(options, out=tmp_path / "disk", resume=True))
    for file in sorted((tmp_path / "memory").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "disk" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("written", "bytes_"), [("12GB", 12e9), ("800 MiB", 800 * 2**20), ("1.5gb", 1.5e9), ("4096", 4096)]
)
def test_sizes(written: str, bytes_: float) -> None:
    assert parse_size(written) == bytes_


@pytest.mark.parametrize("written", ["much", "12XB", ""])
def test_sizes_that_are_none(written: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_size(written)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(BWLAError, match="--device cuda: expected such a GPU, found 0 of them"):
        choose_device("cuda")
    for name in ("tpu", "meta"):
        with pytest.raises(BWLAError, match=f"--device: expected cpu, cuda or auto, found '{name}'"):
            choose_device(name)
