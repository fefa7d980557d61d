"""Measure what one input transform for the down projections of all experts costs, on the weights of a real model.

    python -m benchmarks.quality.experts --text FILE --calibration FILE --out benchmarks/results/experts.json

No pretrained mixture of experts is small enough for the package index, so one is made of a dense model without changing
what it computes: the rows of an MLP are split among four experts, to all of which every token is sent, with equal
weights. The experts have the weights, and the inputs, of a real model, and differ as neurons do; their router does not
matter. Recipe `fast` quantizes the model in three ways, which differ in the down projections:

- `layer`: one input transform for a layer's experts, and the Hessian of each expert's own inputs (what `fast` does);
- `pooled`: one input transform, and one Hessian for all experts;
- `expert`: an input transform for each expert, which the checkpoint format does not have.

d = ln(perplexity / perplexity of the original), with the dequantized weights and 16-bit activations.
"""

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import bwla_converter.cli  # noqa: F401 - says how OpenMP waits, before torch is imported
import torch
from bwla_converter import Options, convert
from bwla_converter.calibration.activations import ActivationStore
from bwla_converter.evaluation.perplexity import perplexity
from bwla_converter.options import Calibration
from bwla_converter.quantize import fast
from bwla_converter.quantize.group import GroupResult
from bwla_converter.quantize.moments import Moments
from bwla_converter.recipes.fast import FastRecipe
from bwla_converter.source.model import Source
from bwla_kernels.format import LayerSpec
from bwla_kernels.reference import dequantize
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.record import command_line, write_result
from benchmarks.common.texts import EXAMPLES, add_text_options, evaluation_windows, model_folder

VARIANTS = ("layer", "pooled", "expert")
COUNT = 4
"""Experts of a layer."""


def as_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Return a Mixtral that computes what a Llama does, whose experts are the parts of its MLPs."""
    llama = model.config
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    others = (
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "tie_word_embeddings",
        "hidden_act",
    )
    config = AutoConfig.for_model(
        "mixtral",
        architectures=["MixtralForCausalLM"],
        intermediate_size=llama.intermediate_size // COUNT,
        num_local_experts=COUNT,
        num_experts_per_tok=COUNT,
        **{key: getattr(llama, key) for key in (*keys, *others)},
    )
    mixture: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(model.dtype)
    state = model.state_dict()
    for index in range(llama.num_hidden_layers):
        prefix = f"model.layers.{index}.mlp."
        gate, up, down = (state.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        parts = zip(gate.chunk(COUNT), up.chunk(COUNT), strict=True)
        state[f"{prefix}experts.gate_up_proj"] = torch.stack([torch.cat(part) for part in parts])
        # The router's weights are 1 / COUNT.
        state[f"{prefix}experts.down_proj"] = COUNT * torch.stack(down.chunk(COUNT, dim=1))
        state[f"{prefix}gate.weight"] = torch.zeros(COUNT, llama.hidden_size, dtype=model.dtype)
    mixture.load_state_dict(state)
    return mixture.eval()


class VariantRecipe(FastRecipe):
    """`fast` with another treatment of the down projections of experts; keeps the dequantized weights."""

    def __init__(self, variant: str, source: Source, calibration: Calibration, seed: int) -> None:
        super().__init__(source, calibration, seed, store=ActivationStore())
        self.weights: dict[str, Tensor] = {}
        self.variant, self.seed, self.usual = variant, seed, self.loop.quantize_group
        self.loop.quantize_group = self.quantize_group

    def quantize_group(
        self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec], moments: Moments, inputs: Tensor
    ) -> GroupResult:
        """Quantize an input group as the variant says."""
        if not moments.parts or self.variant == "layer":
            return self.usual(weights, specs, moments, inputs)
        if self.variant == "pooled":
            return self.usual(weights, specs, replace(moments, parts={}), inputs)
        result = GroupResult({}, {})
        for name, weight in weights.items():
            own = fast.quantize_group(
                {name: weight}, {name: specs[name]}, moments.parts[name], seed=self.seed, options=self.options
            )
            result.tensors.update(own.tensors)
            result.errors.update(own.errors)
        return result

    def quantize(self, weights: Mapping[str, Tensor], specs: Mapping[str, LayerSpec]) -> GroupResult:
        """Quantize an input group, and keep its dequantized weights."""
        result = super().quantize(weights, specs)
        for name, tensors in result.tensors.items():
            self.weights[name] = dequantize(tensors, specs[name])
        return result


def measure(
    variant: str, folder: Path, calibration: Calibration, windows: Tensor, arguments: argparse.Namespace
) -> float:
    """Return the perplexity of the model in `folder` quantized as `variant` says."""
    recipes: list[VariantRecipe] = []

    def make(options: Options, source: Source, _: ActivationStore) -> VariantRecipe:
        assert options.calibration is not None
        recipes.append(VariantRecipe(variant, source, options.calibration, options.seed))
        return recipes[-1]

    out = folder.parent / variant
    convert(
        Options(
            str(folder), out, planes=arguments.planes, rank=0, bits=16, calibration=calibration, overwrite=True,
            threads=arguments.threads, device="cpu", report=False, text_samples=0, head_bits=16, embedding_bits=16,
        ),
        recipe_factory=make,
    )  # fmt: skip
    shutil.rmtree(out)  # holds one input transform for all experts, whatever the variant
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in recipes[0].weights.items():
        _put(model, name, weight)
    return perplexity(model.eval(), windows)


def _put(model: PreTrainedModel, name: str, weight: Tensor) -> None:
    """Replace the weight of a linear, which may be an expert's, by its stored name."""
    path, _, leaf = name.replace("block_sparse_moe", "mlp").rpartition(".")
    if ".experts." not in path:
        linear = model.get_submodule(f"{path}.{leaf}")
        assert isinstance(linear, nn.Linear)
        linear.weight.data.copy_(weight)
        return
    above, _, number = path.rpartition(".")
    experts = model.get_submodule(above)
    if leaf == "w2":
        experts.down_proj.data[int(number)].copy_(weight)
    else:
        rows = experts.gate_up_proj.data[int(number)].chunk(2)[leaf == "w3"]
        rows.copy_(weight)


def main() -> int:
    """Measure all variants; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_text_options(parser, samples=32, length=512)
    parser.add_argument("--calibration", default=str(EXAMPLES / "calibration.txt"), help="calibration text")
    parser.add_argument("--planes", type=int, default=1, help="binary planes of all linears (1)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"({','.join(VARIANTS)})")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense = model_folder(arguments.model)
    windows = evaluation_windows(dense, arguments)
    calibration = Calibration(
        arguments.calibration, arguments.num_calibration_samples, arguments.max_seq_length
    )
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        folder = Path(work) / "mixture"
        model = AutoModelForCausalLM.from_pretrained(dense)
        before = perplexity(model.eval(), windows)
        as_experts(model).save_pretrained(folder)
        for file in dense.glob("tokenizer*"):
            shutil.copy(file, folder)
        original = perplexity(AutoModelForCausalLM.from_pretrained(folder).eval(), windows)
        print(f"perplexity {before:.4f}, as a mixture of experts {original:.4f}", flush=True)
        for variant in arguments.variants.split(","):
            ppl = measure(variant, folder, calibration, windows, arguments)
            rows.append(
                {
                    "model": Path(arguments.model).name,
                    "experts": COUNT,
                    "input_transform": variant,
                    "planes": arguments.planes,
                    "ppl": ppl,
                    "ppl_original": original,
                    "d": math.log(ppl / original),
                    "command": command_line(),
                }
            )
            print(f"{variant}: perplexity {ppl:.3f}, d {rows[-1]['d']:.4f}", flush=True)
            if arguments.out is not None:
                write_result(
                    arguments.out, rows, samples=calibration.num_samples, length=calibration.max_seq_length
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
