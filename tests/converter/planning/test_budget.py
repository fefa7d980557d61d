"""The predicted cost of a conversion: what it counts, and that a conversion that does not fit is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from bwla_converter.checkpoint.dummy import config_source
from bwla_converter.common.devices import choose_device
from bwla_converter.listener import Listener
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_converter.planning import budget as budget_module
from bwla_converter.planning.budget import BudgetError, MachineSpeed, check_budget, predict, usable_memory
from bwla_converter.planning.disk import merging_bytes, replaced_bytes
from bwla_converter.planning.plan import ConversionPlan, make_plan
from bwla_converter.source.folder.files import beside_bytes
from bwla_converter.source.model import Source, open_source
from bwla_converter.training.stages import Stage
from bwla_kernels.cpu.library import available
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.schema import Provenance
from bwla_kernels.precision import product_dtype
from paths import EXAMPLE

SPEED = MachineSpeed(flops=1e11, bytes_moved=1e10, fast_flops=4e11)

TINY = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
}
QWEN3_1_7B = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


@pytest.fixture
def planned(make_model) -> tuple[Source, ConversionPlan]:
    source = open_source(str(make_model()))
    return source, make_plan(source, 2, 6, 1.0, Provenance(base_model="m", recipe="fast", seed=0))


def text(samples: int) -> Calibration:
    return Calibration("text.txt", samples, 128)


@pytest.mark.parametrize(
    ("shape", "recipe", "device", "work", "step", "seconds"),
    [
        (TINY, "data-free", "cpu", 160360832.0, "layer 0, q_proj", 0.080216064),
        (TINY, "paper", "cpu", 198109568.0, "layer 0, o_proj, its inputs", 2.5985868103680003),
        (TINY, "fast", "cpu", 198306944.0, "layer 0, o_proj, its inputs", 5.037803175936),
        (TINY, "best", "cpu", 303889280.0, "layer 0, tuning", 86.16436668825601),
        (
            QWEN3_1_7B,
            "data-free",
            "cpu",
            1093494784.0,
            "writing model.embed_tokens.weight",
            691.3244921856001,
        ),
        (QWEN3_1_7B, "paper", "cpu", 3112798720.0, "layer 0, gate_proj", 6733.236449837059),
        (QWEN3_1_7B, "fast", "cpu", 3314142720.0, "layer 0, gate_proj", 10374.658916614146),
        (QWEN3_1_7B, "fast", "cuda", 3314142720.0, "layer 0, gate_proj", 11797.045784608767),
        (QWEN3_1_7B, "best", "cpu", 35677798400.0, "distillation", 163528.87624984165),
        (LLAMA_8B, "data-free", "cpu", 2475272192.0, "layer 0, gate_proj", 3293.6299593728),
        (LLAMA_8B, "paper", "cpu", 11635632128.0, "layer 0, down_proj", 40244.530686984246),
        (LLAMA_8B, "fast", "cpu", 12508080128.0, "layer 0, down_proj", 55384.23460646087),
        (LLAMA_8B, "fast", "cuda", 14722672640.0, "layer 0, gate_proj", 62903.425261633456),
        (LLAMA_8B, "best", "cuda", 83345014784.0, "distillation", 728576.6698471259),
    ],
)
def test_predictions_of_known_models(
    tmp_path: Path, shape: dict[str, object], recipe: str, device: str, work: float, step: str, seconds: float
) -> None:
    """Benchmarks confirm the memory. The times on the CPU are those of the compiled kernels."""
    if device == "cpu" and not available()[0]:
        pytest.skip("the compiled kernels are not available")
    architecture = ARCHITECTURES[str(shape["model_type"])]
    config = {"tie_word_embeddings": False, **shape, "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    source = config_source(tmp_path)
    plan = make_plan(source, None, 6, 1.0, Provenance(base_model="m", recipe=recipe, seed=0))
    budget = predict(source, plan, recipe, Calibration("text.txt", 128, 2048), 1e12, SPEED, device)
    assert (budget.work, budget.step) == (work, step)
    assert budget.seconds == pytest.approx(seconds, rel=1e-12)
    tokens = 0 if recipe == "data-free" else 128 * 2048
    models = {"data-free": 0, "paper": 1}.get(recipe, 2)
    states = 4 * tokens * int(str(shape["hidden_size"]))
    widths = 32 * int(str(shape["num_attention_heads"])) * (1 if shape is TINY else 4)
    inputs = (
        product_dtype(torch.device(device)).itemsize
        * tokens
        * (widths + int(str(shape["intermediate_size"])))
    )
    assert budget.hidden == (models + 1) * states + models * inputs
    replaced = 0.0 if recipe == "data-free" else replaced_bytes(source, plan, recipe == "best")
    at_the_end = merging_bytes(plan.output_bytes(source), 0)
    assert budget.kept == max(3 * models * states + models * inputs + replaced, at_the_end)
    assert budget.output == plan.output_bytes(source) + (tmp_path / "tokenizer.json").stat().st_size


def test_more_text_costs_time_disk_and_memory_until_it_is_on_disk(planned) -> None:
    few, many = (predict(*planned, "fast", text(samples), 1e12, SPEED) for samples in (8, 80))
    assert few.hidden_in_memory
    inputs = 2 * product_dtype(torch.device("cpu")).itemsize * (128 + 128)
    assert many.hidden == 10 * few.hidden == 80 * 128 * (3 * 4 * 64 + inputs)
    assert many.seconds > few.seconds
    assert many.disk > few.disk
    assert many.memory > few.memory
    tight = predict(*planned, "fast", text(80), many.memory - many.hidden / 2, SPEED)
    assert not tight.hidden_in_memory
    assert tight.memory == pytest.approx(many.memory - many.hidden, rel=0.02)
    assert "on disk" in str(tight)


def test_the_inputs_of_all_layers_are_counted_where_there_is_little_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sensitivities are measured backwards, from the inputs of every layer."""
    monkeypatch.setattr("bwla_converter.recipes.workload.product_dtype", lambda device: torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "architectures": [ARCHITECTURES["llama"]]}))
    source = config_source(tmp_path)
    plan = make_plan(source, None, 6, 1.0, Provenance(base_model="m", recipe="fast", seed=0))
    budget = predict(source, plan, "fast", Calibration("text.txt", 32, 1024), 1e12, SPEED)
    assert budget.hidden == budget.kept == 4 * 16384 * 4096 * (32 + 2)


def test_data_free_keeps_no_text(planned) -> None:
    budget = predict(*planned, "data-free", None, 1e12, SPEED)
    source, plan = planned
    assert budget.hidden == 0
    assert budget.kept == plan.output_bytes(source)  # while the parts are merged
    assert budget.output == plan.output_bytes(source) + beside_bytes(source.folder)
    assert budget.seconds < predict(*planned, "fast", text(80), 1e12, SPEED).seconds


def test_best_counts_what_distillation_trains(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """A latent weight, its gradient and Adam's two moments are 16 bytes."""
    plain = predict(*planned, "best", text(8), 1e12, SPEED)
    stages = [Stage((0,), 10**8), Stage((1,), 10**7)]
    monkeypatch.setattr("bwla_converter.recipes.best.make_stages", lambda source: stages)
    large = predict(*planned, "best", text(8), 1e12, SPEED)
    assert large.step == "distillation"
    assert 16e8 < large.work < 17e8 + plain.work
    assert plain.seconds > predict(*planned, "fast", text(8), 1e12, SPEED).seconds


def test_too_little_memory_is_refused_with_the_numbers(make_model, tmp_path: Path) -> None:
    options = Options(str(make_model()), tmp_path / "out", recipe="data-free", rank=2, max_memory=10**7)
    message = r"expected [\d.]+ [MG]B of memory .*\(peak: .*\), found 10\.0 MB: .* raise --max-memory"
    with pytest.raises(BudgetError, match=message):
        convert(options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_too_little_disk_is_refused_with_the_numbers(planned) -> None:
    budget = predict(*planned, "fast", text(8), 1e12, SPEED)
    check_budget(budget, 1e12, Path("out"), budget.disk * 1.03)
    with pytest.raises(
        BudgetError,
        match=r"out: expected [\d.]+ MB of free disk space \(output [\d.]+ .B, work folder [\d.]+ MB\), found",
    ):
        check_budget(budget, 1e12, Path("out"), budget.disk)


def test_the_control_group_limits_the_usable_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "CGROUP", tmp_path)
    unlimited = usable_memory()
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory() == pytest.approx(unlimited, rel=0.2)
    (tmp_path / "memory.max").write_text("101000000\n")
    resident = psutil.Process().memory_info().rss
    assert usable_memory() == pytest.approx(resident + 0.95e8, abs=0.2e8)


def test_hidden_states_on_disk_give_the_same_bytes(make_model, tmp_path: Path, monkeypatch) -> None:
    model = make_model(vocab_size=json.loads((EXAMPLE / "config.json").read_text())["vocab_size"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, model)
    words = tmp_path / "text.txt"
    words.write_text("It was a bright cold day in April. " * 60)
    options = Options(
        str(model), tmp_path / "memory", recipe="fast", rank=2, calibration=Calibration(str(words), 6, 16)
    )
    convert(options)
    plain = budget_module.predict

    def tight(source, plan, recipe, calibration, limit, **_):
        return plain(source, plan, recipe, calibration, 0.0, SPEED)

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


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert choose_device("auto").type == choose_device("cpu").type == "cpu"
    with pytest.raises(BWLAError, match="--device cuda: expected such a GPU, found 0 GPUs"):
        choose_device("cuda")
    for name in ("tpu", "meta"):
        with pytest.raises(BWLAError, match=f"--device: expected cpu, cuda or auto, found '{name}'"):
            choose_device(name)
