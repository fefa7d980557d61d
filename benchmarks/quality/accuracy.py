"""Compare the perplexity of 1-bit methods on one model: the recipes of BWLA, other methods, and ablations.

    python -m benchmarks.quality.accuracy --quick
    python -m benchmarks.quality.accuracy --model FOLDER --calibration FILE --text FILE --out FILE

d = ln(perplexity / perplexity of the original model) on a text that no method was calibrated on. Each method converts
the model once for each seed, with 6-bit activations; the result is evaluated with 16, 8, 6 and 4-bit activations.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from bwla_converter.common.bits import bits_per_weight
from bwla_converter.evaluation.perplexity import perplexity, windows_of
from bwla_converter.hf.modules import BWLALinear
from bwla_converter.options import Calibration
from bwla_converter.planning.plan import make_plan
from bwla_converter.quantize.data_free import quantize_group
from bwla_converter.quantize.fast import FastOptions
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_converter.recipes.best import BestOptions, BestRecipe
from bwla_converter.recipes.fast import FastRecipe
from bwla_converter.recipes.paper import PaperRecipe
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
    LoopRecipe,
    PeerRecipe,
    RoundToNearest,
    hadamard_spec,
)

ABITS = (16, 8, 6, 4)
LoopedRecipe = PaperRecipe | FastRecipe | BestRecipe | LoopRecipe
Make = Callable[[Source, Calibration, int], LoopedRecipe]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        make: returns the recipe for a source, calibration and seed.
        rank: rank of the low-rank correction; None for that of `--rank`.
        respec: changes a layer's spec.
        ablation: whether it is one of our recipes with a part left out or changed.
    """

    make: Make
    rank: int | None = None
    respec: Callable[[LayerSpec], LayerSpec] = field(default=lambda spec: spec)
    ablation: bool = False


class DataFreeInTheLoop(LoopRecipe):
    """Recipe `data-free`, which uses no calibration text, in the calibration loop that all methods share."""

    def group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """Quantize an input group by its weights alone."""
        return quantize_group(weights, specs, seed=self.seed)


def fast_with(**changes: Any) -> Make:
    """Return a factory of recipe `fast` with changed options."""
    return lambda source, text, seed: FastRecipe(source, text, seed, replace(FastOptions(), **changes))


def best_with(tune: Mapping[str, Any] | None = None, distill: Mapping[str, Any] | None = None) -> Make:
    """Return a factory of recipe `best` with changed options of its tuning and of its distillation."""
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
    "data-free": Method(DataFreeInTheLoop),
    "paper": Method(PaperRecipe),
    "fast": Method(fast_with()),
    "best": Method(best_with()),
    "data-free, rank 0": Method(DataFreeInTheLoop, 0, ablation=True),
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
    """The model, the texts and the rank, which all methods share."""

    source: Source
    windows: Tensor
    calibration: Calibration
    rank: int

    def original(self) -> PreTrainedModel:
        """Load the original model in float32."""
        return AutoModelForCausalLM.from_pretrained(self.source.folder, dtype=torch.float32).eval()


def convert(task: Task, method: Method, seed: int) -> tuple[PreTrainedModel, float]:
    """Return the quantized model and its bits per quantized weight, everything counted."""
    rank = task.rank if method.rank is None else method.rank
    plan = make_plan(task.source, rank, 6, 1.0, Provenance(base_model="benchmark", recipe="", seed=seed), 16)
    specs = {name: method.respec(spec) for name, spec in plan.specs.items()}
    recipe = method.make(task.source, task.calibration, seed)
    model = task.original()
    model.config.use_cache = False  # the quantized layers all have index 0
    for index in range(task.source.num_layers):
        tensors = task.source.read(task.source.names_of_layer(index))
        recipe.begin_layer(index, tensors)
        quantized = recipe.loop.quantized.layer
        for _, names in task.source.groups_of_layer(index):
            recipe.quantize(
                {name: tensors[f"{name}.weight"] for name in names}, {name: specs[name] for name in names}
            )
        recipe.end_layer()
        model.set_submodule(task.source.structure.layer_name(index), quantized.layer)
    if isinstance(recipe, BestRecipe) and recipe.options.distill.epochs:
        distil(model, recipe)
    elif not isinstance(recipe, PaperRecipe):
        model.load_state_dict(recipe.fitted_norm(), strict=False)
    return model, method_bits(recipe, specs)


def distil(model: PreTrainedModel, recipe: BestRecipe) -> None:
    """Distil a quantized model in place and store its linears again."""
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


def method_bits(recipe: LoopedRecipe, specs: dict[str, LayerSpec]) -> float:
    """Return the bits per quantized weight that the method would store, everything counted."""
    if not isinstance(recipe, PeerRecipe):
        return bits_per_weight(specs)
    weights = {name: spec.in_features * spec.out_features for name, spec in specs.items()}
    bits = (
        recipe.true_bits if isinstance(recipe, DensePeer) else {n: recipe.bits(s) for n, s in specs.items()}
    )
    return sum(bits[name] * weights[name] for name in specs) / sum(weights.values())


def at_abits(model: PreTrainedModel, abits: int) -> None:
    """Make every quantized linear quantize its activations to `abits` bits, in place."""
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
    """Return the rows that an earlier run with the same settings has written.

    Raises:
        ValueError: the file was written with other settings.
    """
    if out is None or not out.exists():
        return []
    data = json.loads(out.read_text(encoding="utf-8"))
    if any(data.get(key) != value for key, value in settings.items()):
        raise ValueError(f"--out: {out} was written with other settings, choose another file")
    return list(data["rows"])


def measure(
    task: Task, names: list[str], seeds: int, known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each method, seed and activation width that is not among the `known` rows."""
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
    """Return a table of the mean and standard deviation of d over the seeds."""
    table = Table(
        "method", "bits", *(f"d A{abits}" for abits in ABITS), "seconds", title="d = ln(ppl / original)"
    )
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        cells = []
        for abits in ABITS:
            values = [row["d"] for row in mine if row["abits"] == abits]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}" if values else "")
        seconds = statistics.mean(row["seconds"] for row in mine)
        table.add_row(name, f"{mine[0]['bits_per_weight']:.3f}", *cells, f"{seconds:.0f}")
    return table


def chosen_methods(selection: str) -> list[str]:
    """Return the methods that `--methods` selects.

    Raises:
        ValueError: a name is not a method.
    """
    groups = {
        "all": list(METHODS),
        "main": [name for name, method in METHODS.items() if not method.ablation],
        "ablations": [name for name, method in METHODS.items() if method.ablation],
    } | {name: [name] for name in METHODS}
    names = groups.get(selection) or selection.split(";" if ";" in selection else ",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"expected methods, found {unknown[0]!r} (separate names that contain a comma by ;)")
    return names


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    examples = ROOT / "examples"
    add = parser.add_argument
    add("--model", type=Path, default=examples / "model", help="folder of the model (examples/model)")
    add("--calibration", type=Path, default=examples / "text" / "calibration.txt", help="calibration text")
    add("--text", type=Path, default=examples / "text" / "heldout.txt", help="evaluation text")
    add(
        "--methods",
        default="all",
        help=f"all, main, ablations, or a comma-separated list of: {', '.join(METHODS)}",
    )
    add("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (3)")
    add("--num-calibration-samples", type=int, default=128, help="calibration samples (128)")
    add("--max-seq-length", type=int, default=256, help="tokens of a calibration sample (256)")
    add("--window", type=int, default=512, help="tokens of an evaluation window (512)")
    add("--limit", type=int, default=32, help="number of evaluation windows, spread over the text (32)")
    add("--rank", type=int, default=2, help="rank of the low-rank correction (2)")
    add("--quick", action="store_true", help="one seed and 8 short windows, to see whether it runs")
    add(
        "--out",
        type=Path,
        help="JSON file to write; the rows that it already contains are not measured again",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.num_calibration_samples, arguments.max_seq_length = 1, 8, 128
        arguments.window, arguments.limit = 128, 8
    return arguments


def evaluation_windows(arguments: argparse.Namespace) -> Tensor:
    """Return the evaluation text's windows of token ids [B, T]."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    windows = windows_of(tokenizer(text, return_tensors="pt", verbose=False).input_ids[0], arguments.window)
    count = min(arguments.limit, len(windows))
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def main() -> int:
    """Convert with every method, evaluate and print the table; return the exit status."""
    arguments = parse_arguments()
    samples, length = arguments.num_calibration_samples, arguments.max_seq_length
    windows = evaluation_windows(arguments)
    settings = {
        "samples": samples,
        "length": length,
        "window": arguments.window,
        "windows": len(windows),
        "rank": arguments.rank,
    }
    try:
        methods = chosen_methods(arguments.methods)
        rows = rows_of(arguments.out, settings)
    except ValueError as error:
        print(f"accuracy: {error}", file=sys.stderr)
        return 2
    calibration = Calibration(str(arguments.calibration), samples, length)
    task = Task(open_source(str(arguments.model)), windows, calibration, arguments.rank)
    console = Console()
    for row in measure(task, methods, arguments.seeds, rows):
        console.print(row, soft_wrap=True)
        rows.append(row)
        # Write after each method, so that an interrupted run can be continued.
        if arguments.out is not None and row["abits"] == ABITS[-1]:
            write_result(arguments.out, rows, **settings)
    console.print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
