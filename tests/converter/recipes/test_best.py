"""Recipe `best` on a tiny model: tuning and distillation reduce their losses and return what they store."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bwla_converter.calibration.text import calibration_samples
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration, Options
from bwla_converter.pipeline import convert
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.recipes import base as recipes
from bwla_converter.recipes.best import BestOptions, BestRecipe, relative_loss
from bwla_converter.source.model import Source, open_source
from bwla_converter.training import distill
from bwla_converter.training.distill import DISTILLATION
from bwla_converter.training.optimize import TuneOptions
from bwla_converter.training.stages import make_stages
from bwla_kernels.format import LayerSpec, validate_layer
from bwla_kernels.format.folder import check_folder
from paths import EXAMPLE
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

OPTIONS = BestOptions(
    fast=FastOptions(okt_rounds=3, rounds=2, sweeps=1),
    tune=TuneOptions(epochs=8, batch=1, latent_rate=3e-3),
    distill=replace(DISTILLATION, epochs=6, batch=2),
)
TEXT = "It was a bright cold day in April, and the clocks were striking. " * 40


@pytest.fixture
def source(make_model) -> Source:
    vocab = json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
    folder: Path = make_model("Qwen3", dtype=torch.bfloat16, vocab_size=vocab)
    for file in EXAMPLE.glob("tokenizer*"):
        shutil.copy(file, folder)
    return open_source(str(folder))


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return Calibration(str(path), num_samples=6, max_seq_length=24)


def specs_of(source: Source, names: list[str], planes: int) -> dict[str, LayerSpec]:
    specs = {}
    for name in names:
        rows, columns = source.entries[f"{name}.weight"].shape
        specs[name] = LayerSpec(rows, columns, 1, 8, columns // 8, rank=1, planes=planes)
    return specs


def run(
    recipe: BestRecipe, source: Source, planes: tuple[int, ...] = (1,)
) -> tuple[dict[str, Tensor], PreTrainedModel, list[Tensor]]:
    """Quantize all layers, their input groups with `planes` planes in turn.

    Returns: the stored tensors, the quantized model, and the hidden states after each layer.
    """
    stored: dict[str, Tensor] = {}
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    model.config.use_cache = False  # each layer was built as layer 0 of its own model
    hidden = []
    for index in range(source.num_layers):
        tensors = source.read(source.names_of_layer(index))
        recipe.begin_layer(index, tensors)
        _, quantized = recipe.loop.layers
        for number, (_, names) in enumerate(source.groups_of_layer(index)):
            weights = {name: tensors[f"{name}.weight"] for name in names}
            specs = specs_of(source, names, planes[number % len(planes)])
            result = recipe.quantize(weights, specs)
            for name in names:
                stored |= {f"{name}.{key}": value for key, value in result.tensors[name].items()}
        stored |= recipe.end_layer()
        hidden.append(recipe.loop.hidden[torch.arange(len(recipe.loop.ids))])
        model.set_submodule(f"model.layers.{index}", quantized.layer)
    return stored, model, hidden


@pytest.mark.parametrize("planes", [(1,), (1, 1, 2, 1)])
def test_tuning_reduces_the_loss_and_continues_with_what_is_stored(
    source: Source, calibration: Calibration, planes: tuple[int, ...]
) -> None:
    # The closed form fits several planes to so few tokens that nothing is left to tune, unless the Hessian says little.
    fast = (
        OPTIONS.fast
        if planes == (1,)
        else replace(OPTIONS.fast, planes_damping=100.0, target_damping=math.inf)
    )
    tuned, plain = (
        BestRecipe(
            source, calibration, 0, replace(OPTIONS, fast=fast, tune=replace(OPTIONS.tune, epochs=epochs))
        )
        for epochs in (8, 0)
    )
    stored, model, hidden = run(tuned, source, planes)
    run(plain, source, planes)
    every = torch.arange(6)
    assert torch.equal(tuned.loop.original_hidden[every], plain.loop.original_hidden[every])
    losses = [
        float(relative_loss(recipe.loop.hidden[every], recipe.loop.original_hidden[every]))
        for recipe in (tuned, plain)
    ]
    assert losses[0] < losses[1]
    assert len(tuned.layer_traces["model.layers.1"]["tune"]) == 8
    for name, module in model.named_modules():
        if isinstance(module, BWLALinear):
            own = {key: stored[f"{name}.{key}"] for key in module.stored()}
            validate_layer(name, own, module.spec)
            assert own["weight_scale"].dim() == 1 or bool((own["weight_scale"].diff(dim=1) <= 0).all())
            assert all(torch.equal(value, own[key]) for key, value in module.stored().items())
    norm = "model.layers.1.input_layernorm.weight"
    assert stored[norm].dtype == torch.bfloat16
    assert torch.equal(model.get_parameter(norm), stored[norm].float())
    assert not torch.equal(stored[norm], source.read([norm])[norm])
    with torch.no_grad():
        outputs = model.model(tuned.loop.ids).last_hidden_state
        # A code at a rounding tie may depend on the order of summation.
        torch.testing.assert_close(outputs, model.model.norm(hidden[-1]), rtol=0.05, atol=0.05)


def test_tuning_that_does_not_help_is_rolled_back(
    source: Source, calibration: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    wild = replace(OPTIONS, tune=TuneOptions(epochs=2, scale_rate=3.0))
    plain = replace(OPTIONS, tune=replace(OPTIONS.tune, epochs=0))
    (restored, _, hidden), (expected, _, expected_hidden) = (
        run(BestRecipe(source, calibration, 0, options), source) for options in (wild, plain)
    )
    assert "model.layers.0: tuning did not bring it closer" in caplog.text
    assert all(torch.equal(tensor, restored[name]) for name, tensor in expected.items())
    assert all(torch.equal(one, other) for one, other in zip(hidden, expected_hidden, strict=True))


@pytest.mark.parametrize(
    ("rate", "max_weights", "epochs", "planes"),
    [
        (0.0, 2**28, 20, (1,)),
        (3e-3, 2**28, 20, (1,)),
        (3e-3, 1, 40, (1,)),
        (0.0, 2**28, 20, (1, 1, 2, 1)),
        (3e-3, 1, 40, (1, 1, 2, 1)),
    ],
)
def test_distillation_lowers_the_divergence(
    source: Source,
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    max_weights: int,
    epochs: int,
    planes: tuple[int, ...],
) -> None:
    """With frozen signs, with all signs trained at once, and with one layer's signs trained per stage."""
    monkeypatch.setattr(distill, "make_stages", lambda source: make_stages(source, max_weights))
    patient = replace(OPTIONS.distill, epochs=epochs, latent_rate=rate)
    untuned = replace(OPTIONS.tune, epochs=0)
    recipe = BestRecipe(source, calibration, 0, replace(OPTIONS, tune=untuned, distill=patient))
    stored, model, _ = run(recipe, source, planes)
    changed = recipe.distill(model)
    assert recipe.divergence[-1] < recipe.divergence[0]
    assert not any(name.endswith("rotation_left") for name in changed)
    packed = [name for name in changed if name.endswith("weight_packed")]
    flipped = [name for name in packed if not torch.equal(changed[name], stored[name])]
    assert len(packed) == 14
    assert bool(flipped) == bool(rate)
    if rate:
        assert {name.split(".")[2] for name in flipped} == {"0", "1"}
    assert all(name in stored or name.endswith("norm.weight") for name in changed)
    assert "model.norm.weight" in changed
    for name, tensor in changed.items():
        if name in stored:
            assert (tensor.shape, tensor.dtype) == (stored[name].shape, stored[name].dtype)
    members = ("q_proj", "k_proj", "v_proj")
    shared = [changed[f"model.layers.0.self_attn.{member}.column_scale"] for member in members]
    assert all(torch.equal(tensor, shared[0]) for tensor in shared)


def test_the_final_norm_is_fitted_to_the_quantized_layers(source: Source, calibration: Calibration) -> None:
    untuned = replace(OPTIONS.tune, epochs=0)
    recipe = BestRecipe(source, calibration, 0, replace(OPTIONS, tune=untuned))
    _, model, hidden = run(recipe, source)
    fitted = recipe.fitted_norm()
    name = "model.norm.weight"
    assert list(fitted) == [name]
    assert fitted[name].dtype == torch.bfloat16
    original = model.model.norm(recipe.loop.original_hidden[torch.arange(6)])
    before = (model.model.norm(hidden[-1]) - original).norm()
    model.load_state_dict(fitted, strict=False)
    assert (model.model.norm(hidden[-1]) - original).norm() < before
    recipe.options = replace(recipe.options, fast=replace(OPTIONS.fast, final_norm=False))
    assert recipe.fitted_norm() == {}


def test_distillation_that_does_not_help_leaves_the_fitted_norm(
    source: Source, calibration: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    wild = TuneOptions(epochs=1, scale_rate=3.0)
    untuned = replace(OPTIONS.tune, epochs=0)
    recipe = BestRecipe(source, calibration, 0, replace(OPTIONS, tune=untuned, distill=wild))
    _, model, _ = run(recipe, source)
    changed, fitted = recipe.distill(model), recipe.fitted_norm()
    assert "distillation did not bring the model closer" in caplog.text
    assert changed.keys() == fitted.keys()
    assert all(torch.equal(tensor, fitted[name]) for name, tensor in changed.items())


def test_same_seed_same_bytes(source: Source, calibration: Calibration) -> None:
    first, again = (run(BestRecipe(source, calibration, 3, OPTIONS), source)[0] for _ in range(2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_the_whole_recipe_writes_a_checkpoint(
    source: Source, calibration: Calibration, tmp_path: Path
) -> None:
    """Through the pipeline: tuned norms, distilled scales and chosen clips are in the model that transformers loads."""
    options = Options(
        str(source.folder),
        tmp_path / "out",
        recipe="best",
        rank=1,
        bits=4,
        head_bits=8,
        calibration=calibration,
    )
    # So little text would be fitted almost perfectly; leave an error that training can reduce.
    coarse = replace(OPTIONS.fast, sweeps=0, damping=0.5, target_damping=1.0)
    gentle = TuneOptions(
        epochs=12, batch=2, latent_rate=0.0, scale_rate=2e-3, low_rank_rate=2e-3, norm_rate=2e-3
    )
    best = replace(OPTIONS, fast=coarse, tune=gentle, distill=gentle)
    convert(options, recipe_factory=lambda _, model, store: BestRecipe(model, calibration, 0, best, store))
    report = json.loads((options.out / "bwla_report.json").read_text())
    assert len(report["traces"]["model.layers.1"]["tune"]) == 12
    clips = {name: spec.clip for name, spec in check_folder(options.out).items()}
    assert clips == {layer["name"]: layer["clip"] for layer in report["linears"]}
    assert min(clips.values()) < 1
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    norms = [name for name, _ in model.named_parameters() if name.endswith("layernorm.weight")]
    before = source.read(norms)
    assert not all(torch.equal(model.get_parameter(name), before[name].float()) for name in norms)
    assert bool(model(calibration_ids(source, calibration)).logits.isfinite().all())


def calibration_ids(source: Source, calibration: Calibration) -> Tensor:
    return calibration_samples(calibration, source.folder, 0)[0][:1]


def test_budgets_of_the_command_line() -> None:
    """Half of the minutes go to the tuning of all layers together, half to distillation."""
    options = Options("model", Path("out"), tune_epochs=5, distill_epochs=0, minutes=60.0, recipe="best")
    best = recipes.best_options(options, FastOptions(), num_layers=10)
    assert (best.tune.epochs, best.distill.epochs) == (5, 0)
    assert (best.tune.minutes, best.distill.minutes) == (3.0, 30.0)
    assert (
        recipes.best_options(Options("model", Path("out"), recipe="best"), FastOptions(), 10) == BestOptions()
    )
