"""Measure what an 8-bit embedding and an 8-bit head cost in perplexity; nothing else of the model is quantized.

    python -m benchmarks.quality.embedding --model FOLDER --text FILE --limit 32 --out FILE

Embedding and head are quantized as `bwla-convert` does, and computed by the kernels. A model whose head is tied to its
embedding is measured as if it were untied too, which tells the cost of the two apart.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bwla_converter.evaluation.perplexity import windows_of
from bwla_kernels.format.head import HeadSpec
from bwla_kernels.head import dequantize_rows, quantize_head
from bwla_kernels.ops import select_head_backend
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common.record import write_result

BITS = (16, 8)
Head = Callable[[Tensor], Tensor]


def quantized_head(weight: Tensor) -> Head:
    """Return the function that computes logits with `weight` [V, K] in 8 bits, by the kernel of this machine."""
    spec = HeadSpec(*weight.shape)
    backend, _ = select_head_backend(spec, weight.device)
    tensors = backend.prepare(quantize_head(weight), spec)
    return lambda hidden: backend.apply(hidden, tensors, spec)


def bytes_of(weight: Tensor, bits: int) -> int:
    """Return the size of a weight [V, K] as it is stored: int8 with a float32 scale per row, or two bytes each."""
    return weight.numel() + 4 * weight.shape[0] if bits == 8 else 2 * weight.numel()


@torch.inference_mode()
def perplexities(model: PreTrainedModel, windows: Tensor) -> dict[tuple[int, int], float]:
    """Return the perplexity on `windows` [count, length] by the bits of embedding and head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    heads: dict[int, Head] = {16: head, 8: quantized_head(head.weight)}
    original = embedding.weight.clone()
    tensors = quantize_head(original)
    tables = {
        16: original,
        8: dequantize_rows(**tensors, ids=torch.arange(len(original)), dtype=original.dtype),
    }
    # A tied head keeps its weight.
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    loss = {(first, second): 0.0 for first in BITS for second in BITS}
    for number, window in enumerate(windows.split(1), 1):
        for bits, table in tables.items():
            embedding.weight = nn.Parameter(table, requires_grad=False)
            hidden = model.base_model(window, use_cache=False).last_hidden_state[0, :-1]
            for head_bits, compute in heads.items():
                losses = nn.functional.cross_entropy(compute(hidden).float(), window[0, 1:], reduction="sum")
                loss[bits, head_bits] += losses.item()
        print(f"{number} of {len(windows)} windows", flush=True)
    count = windows.shape[0] * (windows.shape[1] - 1)
    return {bits: math.exp(total / count) for bits, total in loss.items()}


def rows_of(model: PreTrainedModel, windows: Tensor) -> list[dict[str, Any]]:
    """Measure the model; return a row for each choice of bits."""
    weight = model.get_input_embeddings().weight
    tied = bool(model.config.tie_word_embeddings)
    table = perplexities(model, windows)
    return [
        {
            "embedding_bits": bits,
            "head_bits": head_bits,
            "embedding_and_head_bytes": bytes_of(weight, bits)
            + (0 if tied and bits == head_bits else bytes_of(weight, head_bits)),
            "ppl": ppl,
            "percent": 100 * (ppl / table[16, 16] - 1),
            "d": math.log(ppl / table[16, 16]),
        }
        for (bits, head_bits), ppl in table.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the original model")
    parser.add_argument("--text", type=Path, required=True, help="held-out text, UTF-8")
    parser.add_argument("--window", type=int, default=2048, help="sequence length in tokens")
    parser.add_argument("--limit", type=int, help="number of sequences; all by default")
    parser.add_argument("--out", type=Path, required=True, help="result file")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.text.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = windows_of(ids, arguments.window)[: arguments.limit]
    facts = {"model": arguments.model.name, "text": arguments.text.name, "tokens": windows.numel()}
    write_result(arguments.out, rows_of(model, windows), **facts, window=arguments.window)


if __name__ == "__main__":
    main()
