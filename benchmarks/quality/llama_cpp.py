"""Compare a model of one bit or three values in llama.cpp with the same file imported by bwla-convert.

    python -m benchmarks.quality.llama_cpp --llama-bin llama-build/bin --types Q1_0,TQ1_0,TQ2_0 --text FILE

No model that is trained in one bit is on the package index, so a real model is quantized by llama.cpp's own tool, whose
rounding costs most of what the model knows: the two engines are compared with each other, not with the original. Its
width of 576 is padded to 768, which groups of 128 and 256 columns divide: the added channels, heads and their weights
are zero, so the model computes the same. Only the layers that --layers names get few values, so that their errors do
not drown the engines' differences; the linears of all others stay in 16 bits.

llama.cpp's perplexity tool writes its tokens and its log probabilities (of the second half of each window); the
imported model is evaluated on the same tokens by transformers with BWLA's kernels. `benchmarks.serving.llama_cpp` says
where llama.cpp comes from; this needs the targets llama-quantize and llama-perplexity.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from bwla_converter import Options, convert
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common.real_models import get_gguf
from benchmarks.common.record import ROOT, write_result

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 768, 12, 4, 64
"""Sizes of the padded model; SmolLM2-135M has 576, 9, 3 and 64."""

TRUE_WIDTH = 576
PADDED = {
    "embedding_length": WIDTH,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5 * TRUE_WIDTH / WIDTH,
}
"""Metadata that changes. The mean of squares runs over more channels, of which the added ones are zero."""

ROWS = {
    "attn_q": HEADS * HEAD_DIM, "attn_k": KV_HEADS * HEAD_DIM, "attn_v": KV_HEADS * HEAD_DIM,
    "attn_output": WIDTH, "ffn_down": WIDTH,
}  # fmt: skip
COLUMNS = {
    "attn_q": WIDTH, "attn_k": WIDTH, "attn_v": WIDTH, "attn_output": HEADS * HEAD_DIM,
    "ffn_gate": WIDTH, "ffn_up": WIDTH, "token_embd": WIDTH,
}  # fmt: skip

CLEAR_MARGIN = 0.5
"""Nats by which the likeliest token leads where the choice is clear."""

LINEARS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


@dataclass(frozen=True)
class LlamaLogits:
    """What llama.cpp's perplexity tool saves.

    Attributes:
        tokens: token ids [C, T] of the windows.
        logprobs: log probabilities [C, T - 1 - T / 2, V] of the tokens after position T / 2, to 16 bits of their range.
    """

    tokens: Tensor
    logprobs: Tensor


def write_padded(source: Path, path: Path) -> None:
    """Write the model of a GGUF file with wider layers that compute the same, in float16."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    changes = {f"{architecture}.{key}": value for key, value in PADDED.items()}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, changes.get(name, field.contents()), kind, sub_type=inner)
    for tensor in reader.tensors:
        value = dequantize(np.array(tensor.data), tensor.tensor_type).reshape(tensor.shape[::-1])
        padded = _pad(tensor.name, value)
        writer.add_tensor(tensor.name, padded.astype(np.float32 if padded.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pad(name: str, value: np.ndarray) -> np.ndarray:
    """Return a tensor with zeros for the added channels and heads; the norms make up for the larger mean."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if value.ndim == 1:
        return np.pad(value * math.sqrt(TRUE_WIDTH / WIDTH), (0, WIDTH - len(value)))
    rows, columns = ROWS.get(kind, value.shape[0]), COLUMNS.get(kind, value.shape[1])
    return np.pad(value, ((0, rows - value.shape[0]), (0, columns - value.shape[1])))


def run(*command: object) -> str:
    """Run a command and return its output.

    Raises:
        RuntimeError: it failed; quotes the end of its output.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {(done.stdout + done.stderr).strip()[-500:]}")
    return done.stdout + done.stderr


def read_logits(path: Path) -> LlamaLogits:
    """Read a file of `llama-perplexity --save-all-logits` (llama.cpp, tools/perplexity/perplexity.cpp, process_logits).

    Raises:
        RuntimeError: it is not such a file.
    """
    data = path.read_bytes()
    if data[:8] != b"_logits_":
        raise RuntimeError(f"{path}: expected saved logits, found other contents")
    length, vocabulary, chunks = np.frombuffer(data, np.int32, 3, 8)
    tokens = np.frombuffer(data, np.int32, chunks * length, 20).reshape(chunks, length)
    rows, width = length - 1 - length // 2, 2 * ((vocabulary + 1) // 2) + 4
    table = np.frombuffer(data, np.uint16, chunks * rows * width, 20 + 4 * chunks * length)
    table = table.reshape(chunks, rows, width)
    scale, least = (table[..., at : at + 2].copy().view(np.float32) for at in (0, 2))
    logprobs = table[..., 4 : 4 + vocabulary].astype(np.float32) * scale + least
    return LlamaLogits(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(logprobs))


def our_logprobs(folder: Path, tokens: Tensor) -> Tensor:
    """Return log probabilities as `LlamaLogits` has them, of a BWLA checkpoint or another model."""
    import bwla_converter.hf  # noqa: F401 - registers the quantizer with transformers

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    first = tokens.shape[1] // 2
    with torch.inference_mode():
        windows = [model(window.unsqueeze(0)).logits[0, first:-1].log_softmax(-1) for window in tokens]
    return torch.stack(windows)


def perplexity(logprobs: Tensor, tokens: Tensor) -> float:
    """Return exp of the mean negative log likelihood of the tokens that `logprobs` predict."""
    targets = tokens[:, tokens.shape[1] // 2 + 1 :].unsqueeze(-1)
    return math.exp(-logprobs.gather(-1, targets).double().mean().item())


def compare(arguments: argparse.Namespace, kind: str, work: Path) -> dict[str, Any]:
    """Return a row: perplexities of both engines on one file, and how often their likeliest tokens agree."""
    quantize, tool = (arguments.llama_bin / name for name in ("llama-quantize", "llama-perplexity"))
    source, quantized, logits = work / "padded.gguf", work / f"{kind}.gguf", work / "logits"
    if not source.exists():
        write_padded(get_gguf("smollm2-135m"), source)
    few = "|".join(map(str, arguments.layers))
    run(
        quantize, "--pure", "--token-embedding-type", "f16", "--output-tensor-type", "f16",
        "--tensor-type", rf"blk\.(?!({few})\.)\d+\..*=f16", source, quantized, kind, arguments.threads,
    )  # fmt: skip
    output = run(
        tool, "-m", quantized, "-f", arguments.text, "-c", arguments.window, "-b", arguments.window,
        "--chunks", arguments.limit, "-t", arguments.threads, "--save-all-logits", logits,
    )  # fmt: skip
    found = re.search(r"Final estimate: PPL = ([\d.]+)", output)
    if found is None:
        raise RuntimeError(f"{tool.name}: expected a final estimate, found none: {output[-300:]}")
    theirs = read_logits(logits)
    best = theirs.logprobs.topk(2).values
    is_clear = best[..., 0] - best[..., 1] > CLEAR_MARGIN
    row: dict[str, Any] = {"type": kind, "ppl_llama_cpp": float(found[1])}
    row["clear_share"] = is_clear.float().mean().item()
    ignored = (rf"re:.*layers\.(?!({few})\.).*({LINEARS})",)
    for abits in arguments.abits:
        out = work / f"{kind}-{abits}"
        options = Options(
            str(quantized),
            out,
            recipe="lossless",
            ignore=ignored,
            bits=abits,
            head_bits=16,
            embedding_bits=16,
            device="cpu",
            threads=arguments.threads,
            report=False,
            text_samples=0,
            overwrite=True,
        )
        summary = convert(options)
        ours = our_logprobs(out, theirs.tokens)
        same = ours.argmax(-1) == theirs.logprobs.argmax(-1)
        ppl = perplexity(ours, theirs.tokens)
        row[f"a{abits}"] = {
            "ppl": ppl,
            "ratio": ppl / row["ppl_llama_cpp"],
            "top_1_agreement": same.float().mean().item(),
            "top_1_agreement_where_clear": same[is_clear].float().mean().item(),
            "bits_per_weight": summary.bits_per_weight,
        }
    row["ppl_from_saved"] = perplexity(theirs.logprobs, theirs.tokens)
    return row


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--llama-bin", type=Path, required=True, help="folder with llama.cpp's tools")
    add("--types", default="Q1_0,TQ1_0,TQ2_0", help="types of the linears (Q1_0,TQ1_0,TQ2_0)")
    add("--layers", default="4,14,24", help="decoder layers with few values (4,14,24)")
    add("--abits", default="8,16", help="activation bits of the import (8,16)")
    add("--text", type=Path, default=ROOT / "examples" / "text" / "heldout.txt", help="evaluation text")
    add("--window", type=int, default=512, help="tokens of a window, whose second half counts (512)")
    add("--limit", type=int, default=8, help="number of windows (8)")
    add("--threads", type=int, default=1, help="threads (1)")
    add("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    for name in ("layers", "abits"):
        setattr(arguments, name, [int(text) for text in getattr(arguments, name).split(",")])
    arguments.types = arguments.types.split(",")
    return arguments


def main() -> int:
    """Compare, print and record; return the exit status."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.types:
            rows.append(compare(arguments, kind, Path(folder)))
            print(rows[-1], flush=True)
    settings = {"layers": arguments.layers, "window": arguments.window, "windows": arguments.limit}
    if arguments.out is not None:
        write_result(arguments.out, rows, text=arguments.text.name, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
