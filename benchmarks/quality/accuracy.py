"""What one bit costs, method by method, on the same model, text and seeds: our recipes, peers, ablations.

    python -m benchmarks.quality.accuracy --quick
    python -m benchmarks.quality.accuracy --model FOLDER --calibration FILE --text FILE --out FILE

d = ln(perplexity / perplexity of the original) on text that no method has seen. A method is converted once a seed, at
6-bit activations, and its weights are then evaluated at 16, 8, 6 and 4 bits.
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bwla_converter.common.bits import bits_per_weight
from bwla_converter.evaluation.perplexity import perplexity, windows_of
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration
from bwla_converter.planning.plan import make_plan
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_converter.quantize.paper import quantize_group
from bwla_converter.recipes.base import Recipe
from bwla_converter.recipes.best import BestOptions, BestRecipe
from bwla_converter.recipes.fast import FastRecipe
from bwla_converter.source.model import Source, open_source
from bwla_converter.training.ste_linear import norm_weights
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.schema import Provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common.record import ROOT, write_result
from benchmarks.quality.peers import (
    BiLLM,
    DensePeer,
    FakeLinear,
    Gptq,
    GroupedGptq,
    HadamardGptq,
    PeerRecipe,
    RoundToNearest,
    hadamard_spec,
)

ABITS = (16, 8, 6, 4)
Make = Callable[[Source, Calibration, int], Recipe]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        make: the recipe for a source, calibration and seed.
        rank: rank of the low-rank part; None for the one that was asked for.
        respec: change of a layer's spec.
        ablation: whether it is one of our recipes with a part left out or changed.
    """

    make: Make
    rank: int | None = None
    respec: Callable[[LayerSpec], LayerSpec] = field(default=lambda spec: spec)
    ablation: bool = False


class PaperInTheLoop(FastRecipe):
    """`paper` sees no text; carrying it along lets its blocks be collected like all others'."""

    def group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """By the weights alone."""
        return quantize_group(weights, specs, seed=self.seed)

    def fitted_norm(self) -> dict[str, Tensor]:
        """It knows no norms."""
        return {}


def fast_with(**changes: Any) -> Make:
    """`fast` with other options."""
    return lambda source, text, seed: FastRecipe(source, text, seed, replace(FastOptions(), **changes))


def best_with(tune: Mapping[str, Any] | None = None, distill: Mapping[str, Any] | None = None) -> Make:
    """`best` with other options of its blocks' tuning and of its distillation."""
    usual = BestOptions()
    options = replace(
        usual, tune=replace(usual.tune, **(tune or {})), distill=replace(usual.distill, **(distill or {}))
    )
    return lambda source, text, seed: BestRecipe(source, text, seed, options)


METHODS: dict[str, Method] = {
    "rtn": Method(RoundToNearest, 0),
    "gptq": Method(Gptq, 0),
    "gptq, equal bits": Method(GroupedGptq),
    "hadamard+gptq": Method(HadamardGptq, 0, hadamard_spec),
    "billm": Method(BiLLM, 0),
    "paper": Method(PaperInTheLoop),
    "fast": Method(fast_with()),
    "best": Method(best_with()),
    "paper, rank 0": Method(PaperInTheLoop, 0, ablation=True),
    "fast, random rotation": Method(fast_with(okt_rounds=0), ablation=True),
    "fast, no PSP": Method(fast_with(), 0, ablation=True),
    "fast, no column scales": Method(fast_with(column_scales=False), ablation=True),
    "fast, no error feedback": Method(fast_with(gptq_signs=False, sweeps=0), ablation=True),
    "fast, no coordinate descent": Method(fast_with(sweeps=0), ablation=True),
    "fast, last norm as it was": Method(fast_with(final_norm=False), ablation=True),
    "fast, original target": Method(fast_with(target_damping=float("inf")), ablation=True),
    "best, 8 distillation epochs": Method(best_with(distill={"epochs": 8}), ablation=True),
    "best, no tuning": Method(best_with(tune={"epochs": 0}), ablation=True),
    "best, signs not distilled": Method(best_with(distill={"latent_rate": 0.0}), ablation=True),
    "best, no distillation": Method(best_with(distill={"epochs": 0}), ablation=True),
}


@dataclass(frozen=True)
class Task:
    """What all methods share."""

    source: Source
    windows: Tensor
    calibration: Calibration
    rank: int

    def original(self) -> PreTrainedModel:
        """The model as it was, float32."""
        return AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=torch.float32).eval()


def convert(task: Task, method: Method, seed: int) -> tuple[PreTrainedModel, float]:
    """The quantized model in memory, and its all-in bits per quantized weight."""
    rank = task.rank if method.rank is None else method.rank
    plan = make_plan(task.source, rank, 6, 1.0, Provenance(base_model="benchmark", recipe="", seed=seed), 16)
    specs = {name: method.respec(spec) for name, spec in plan.specs.items()}
    recipe = method.make(task.source, task.calibration, seed)
    assert isinstance(recipe, FastRecipe)
    model = task.original()
    model.config.use_cache = False  # each block that is put in believes to be the first one
    for index in range(task.source.num_layers):
        tensors = task.source.read(task.source.names_of_layer(index))
        recipe.begin_layer(index, tensors)
        _, quantized = recipe.blocks
        for _, names in task.source.groups_of_layer(index):
            recipe.quantize(
                {name: tensors[f"{name}.weight"] for name in names}, {name: specs[name] for name in names}
            )
        recipe.end_layer()
        model.set_submodule(task.source.family.layer_name(index), quantized.layer)
    if isinstance(recipe, BestRecipe) and recipe.best.distill.epochs:
        distil(model, recipe)
    else:
        model.load_state_dict(recipe.fitted_norm(), strict=False)
    return model, method_bits(recipe, specs)


def distil(model: PreTrainedModel, recipe: BestRecipe) -> None:
    """Distil a quantized model in place: stored linears again, with what changed."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, BWLALinear)}
    norms = {name: value.clone() for name, value in norm_weights(model).items()}
    changed = recipe.distill(model)
    for name, linear in linears.items():
        stored = {key: changed.get(f"{name}.{key}", value) for key, value in linear.stored().items()}
        bias = stored.pop("bias", None)
        model.set_submodule(name, BWLALinear.from_stored(name, linear.spec, stored, bias))
    model.load_state_dict(
        {name: changed.get(name, value).float() for name, value in norms.items()}, strict=False
    )


def method_bits(recipe: Recipe, specs: dict[str, LayerSpec]) -> float:
    """All-in bits per quantized weight, as the method would store them."""
    if not isinstance(recipe, PeerRecipe):
        return bits_per_weight(specs.values())
    weights = {name: spec.in_features * spec.out_features for name, spec in specs.items()}
    of = recipe.true_bits if isinstance(recipe, DensePeer) else {n: recipe.bits(s) for n, s in specs.items()}
    return sum(of[name] * weights[name] for name in specs) / sum(weights.values())


def at_abits(model: PreTrainedModel, abits: int) -> None:
    """Let every quantized linear quantize its activations to `abits`, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BWLALinear):
            stored = {key: value for key, value in module.stored().items() if key != "bias"}
            other = BWLALinear.from_stored(
                name, replace(module.spec, bits=abits), stored, getattr(module, "bias", None)
            )
            model.set_submodule(name, other)
        elif isinstance(module, FakeLinear):
            module.bits = abits


def rows_of(out: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier run with the same settings has written; they are not measured again.

    Raises:
        typer.BadParameter: the file is of a run with other settings.
    """
    if out is None or not out.exists():
        return []
    data = json.loads(out.read_text(encoding="utf-8"))
    if any(data.get(key) != value for key, value in settings.items()):
        raise typer.BadParameter(
            f"{out} holds rows of other settings: choose another file", param_hint="--out"
        )
    return list(data["rows"])


def measure(
    task: Task, names: list[str], seeds: int, known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A row for each method, seed and activation width that is not among the `known` ones."""
    done = {(row["method"], row["seed"]) for row in known}
    ppl_original = perplexity(task.original(), task.windows)
    for seed in range(seeds):
        for name in names:
            if (name, seed) in done:
                continue
            started = time.monotonic()
            model, bits = convert(task, METHODS[name], seed)
            seconds = time.monotonic() - started
            for abits in ABITS:
                at_abits(model, abits)
                ppl = perplexity(model, task.windows)
                row = {
                    "model": task.source.folder.name,
                    "method": name,
                    "abits": abits,
                    "seed": seed,
                    "bits_per_weight": round(bits, 4),
                    "ppl_original": ppl_original,
                    "ppl": ppl,
                    "d": math.log(ppl / ppl_original),
                    "seconds": round(seconds, 1),
                }
                yield row
            del model
            gc.collect()


def summary(rows: list[dict[str, Any]]) -> Table:
    """Mean and deviation of d over the seeds."""
    table = Table(
        "method", "bits", *(f"d A{abits}" for abits in ABITS), "seconds", title="d = ln(ppl / original)"
    )
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        cells = []
        for abits in ABITS:
            found = [row["d"] for row in mine if row["abits"] == abits]
            spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.4f}{spread}" if found else "")
        seconds = statistics.mean(row["seconds"] for row in mine)
        table.add_row(name, f"{mine[0]['bits_per_weight']:.3f}", *cells, f"{seconds:.0f}")
    return table


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")] = ROOT / "examples/model",
    calibration: Annotated[Path, typer.Option(help="Calibration text.")] = ROOT
    / "examples/text/calibration.txt",
    text: Annotated[Path, typer.Option(help="Text to evaluate on.")] = ROOT / "examples/text/heldout.txt",
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(METHODS)}; or all, main, ablations.")
    ] = "all",
    seeds: Annotated[int, typer.Option(help="Seeds 0, 1, ...")] = 3,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 256,
    window: Annotated[int, typer.Option(help="Tokens of a window to evaluate on.")] = 512,
    limit: Annotated[int, typer.Option(help="Windows to evaluate on, spread over the text.")] = 32,
    rank: Annotated[int, typer.Option(help="Rank of the low-rank part.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, 8 short windows: does it run?")] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write; a run that was stopped goes on.")
    ] = None,
) -> None:
    """Convert by every method, evaluate, print the table."""
    if quick:
        seeds, samples, length, window, limit = 1, 8, 128, 128, 8
    groups = {
        "all": list(METHODS),
        "main": [name for name, method in METHODS.items() if not method.ablation],
        "ablations": [name for name, method in METHODS.items() if method.ablation],
    } | {name: [name] for name in METHODS}
    chosen = groups.get(methods) or methods.split(";" if ";" in methods else ",")
    for name in chosen:
        if name not in METHODS:
            raise typer.BadParameter(f"{name!r} is no method; separate names that hold a comma by ;")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    windows = windows_of(ids, window)
    windows = windows[torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()]
    task = Task(open_source(str(model)), windows, Calibration(str(calibration), samples, length), rank)
    console = Console()
    settings = {"samples": samples, "length": length, "window": window, "windows": len(windows), "rank": rank}
    rows = rows_of(out, settings)
    for row in measure(task, chosen, seeds, rows):
        console.print(row, soft_wrap=True)
        rows.append(row)
        if out is not None and row["abits"] == ABITS[-1]:  # a long run that is stopped keeps what it has
            write_result(out, rows, **settings)
    console.print(summary(rows))


if __name__ == "__main__":
    typer.run(main)
