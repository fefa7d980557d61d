"""Measure what a language-model head in binary planes costs in perplexity; nothing else of the model is quantized.

    python -m benchmarks.quality.head --text FILE --calibration FILE --out benchmarks/results/head.json

The head is quantized as `bwla-convert --lm-head-bits` does, but for its inputs in the original model, and computed by
the kernels. d = ln(perplexity / perplexity of the original).
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from bwla_converter.calibration.text import calibration_samples
from bwla_converter.common.bits import stored_bits
from bwla_converter.options import HEAD_PLANES, Calibration
from bwla_converter.quantize.moments import Moments
from bwla_converter.recipes.head import quantize_head
from bwla_kernels.factorize import choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.head import HEAD_MODULE
from bwla_kernels.ops import select_backend
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common.record import command_line, write_result
from benchmarks.common.texts import EXAMPLES, add_text_options, evaluation_windows, model_folder
from benchmarks.quality.embedding import bytes_of, quantized_head

ACTIVATION_BITS = (6, 8, 16)


@dataclass(frozen=True)
class Measured:
    """A head: its name, the bits of its inputs, its bytes, the seconds that it took, and how it computes logits."""

    name: str
    abits: int
    nbytes: int
    seconds: float
    compute: Callable[[Tensor], Tensor]


@torch.inference_mode()
def inputs_of(model: PreTrainedModel, samples: Tensor) -> tuple[Moments, Tensor]:
    """Return the moments of the head's inputs for calibration samples [S, T], and some of the inputs."""
    moments, some = Moments.zeros(model.config.hidden_size, torch.device("cpu"), cross_gram=False), []
    for sample in samples.split(4):
        hidden = model.base_model(sample, use_cache=False).last_hidden_state
        moments.add(hidden)
        some.append(hidden.flatten(0, 1)[::16])
    return moments, torch.cat(some)


@torch.inference_mode()
def heads_of(model: PreTrainedModel, samples: Tensor) -> Iterator[Measured]:
    """Yield the heads to measure: the original, in 8 bits, and in planes with each number of activation bits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    weight = head.weight
    yield Measured("16 bits", 16, bytes_of(weight, 16), 0.0, head)
    yield Measured("8 bits", 16, bytes_of(weight, 8), 0.0, quantized_head(weight))
    moments, inputs = inputs_of(model, samples)
    rows, columns = weight.shape
    for planes in HEAD_PLANES:
        spec = LayerSpec(rows, columns, *choose_rotation(columns), planes=planes)
        begun = time.perf_counter()
        stored = quantize_head(weight, spec, moments, inputs=inputs).tensors[HEAD_MODULE]
        seconds = time.perf_counter() - begun
        for bits in ACTIVATION_BITS:
            own = replace(spec, bits=bits)
            backend, _ = select_backend(own, weight.device)
            prepared = backend.prepare(stored, own)
            nbytes = stored_bits(HEAD_MODULE, own) // 8
            compute = partial(backend.apply, tensors=prepared, spec=own)
            yield Measured(f"{planes} planes", bits, nbytes, seconds, compute)


@torch.inference_mode()
def perplexities(model: PreTrainedModel, windows: Tensor, heads: list[Measured]) -> list[float]:
    """Return the perplexity on `windows` [count, length] with each head."""
    losses = [0.0] * len(heads)
    for number, window in enumerate(windows.split(1), 1):
        hidden = model.base_model(window, use_cache=False).last_hidden_state[0, :-1]
        for place, head in enumerate(heads):
            logits = head.compute(hidden).float()
            losses[place] += nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        print(f"{number} of {len(windows)} windows", flush=True)
    return [math.exp(loss / windows[:, 1:].numel()) for loss in losses]


def main() -> int:
    """Measure all heads; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_text_options(parser, samples=32, length=512)
    parser.add_argument("--calibration", default=str(EXAMPLES / "calibration.txt"), help="calibration text")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = model_folder(arguments.model)
    calibration = Calibration(
        arguments.calibration, arguments.num_calibration_samples, arguments.max_seq_length
    )
    samples, _ = calibration_samples(calibration, folder, 0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    heads = list(heads_of(model, samples))
    found = perplexities(model, evaluation_windows(folder, arguments), heads)
    rows = [
        {
            "model": Path(arguments.model).name,
            "head": head.name,
            "abits": head.abits,
            "bytes": head.nbytes,
            "seconds": round(head.seconds, 1),
            "ppl": ppl,
            "d": math.log(ppl / found[0]),
            "command": command_line(),
        }
        for head, ppl in zip(heads, found, strict=True)
    ]
    for row in rows:
        print(f"{row['head']}, A{row['abits']}: perplexity {row['ppl']:.3f}, d {row['d']:.4f}", flush=True)
    if arguments.out is not None:
        write_result(arguments.out, rows, samples=len(samples), length=samples.shape[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
