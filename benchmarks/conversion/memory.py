"""Compare the peak memory of a conversion with its prediction, on a random model in a separate process.

    python -m benchmarks.conversion.memory --out benchmarks/results/convert_memory.json
    python -m benchmarks.conversion.memory --recipe fast --shape 1.7b --layers 2 --quick \\
        --out benchmarks/results/convert_memory_fast.json

The peak must be within 20 % of what `planning.budget` predicts and, for recipe data-free, below a quarter of the
model's bytes plus 1 GB. Layers are converted one after the other, so a few of them have the same peak as all. `--quick`
reduces the rounds of the recipe's steps, which does not change the peak.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common.record import ROOT, write_result

EXAMPLE = ROOT / "examples"
SHAPES: dict[str, dict[str, Any]] = {
    "1.2b": {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000},
    # Qwen3-1.7B
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    # Qwen3-0.6B
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    # Qwen3-8B with a small vocabulary, which spares memory that has nothing to do with the decoder layers
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
    },
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096},
}
TOLERANCE = 0.2


def write_random_model(folder: Path, layers: int, shape: str) -> int:
    """Write a random bfloat16 Qwen3 model with one shard for each layer; return the tensors' bytes."""
    sizes = SHAPES[shape]
    heads = {
        "num_attention_heads": sizes["hidden_size"] // 128,
        "num_key_value_heads": sizes["hidden_size"] // 256,
    }
    config = AutoConfig.for_model(
        "qwen3",
        architectures=["Qwen3ForCausalLM"],
        num_hidden_layers=layers,
        head_dim=128,
        dtype="bfloat16",
        **heads | sizes,
    )
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / "model" / name, folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, size in shapes.items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = size
    weight_map, total = {}, 0
    for file, members in shards.items():
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if name.endswith("norm.weight")
            else (torch.randn(size, generator=generator) * 0.02).bfloat16()
            for name, size in members.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def convert_here(model: Path, out: Path, arguments: argparse.Namespace) -> None:
    """Convert in this process and print the prediction, the peak and the seconds as JSON."""
    from bwla_converter.listener import Listener
    from bwla_converter.options import Calibration, Options
    from bwla_converter.pipeline import convert
    from bwla_converter.planning.budget import Budget
    from bwla_converter.quantize import data_free, fast, paper
    from bwla_converter.recipes import base as recipes
    from bwla_converter.report.data import peak_resident_bytes

    if arguments.quick:
        few = partial(fast.FastOptions, okt_rounds=1, rounds=1, sweeps=1)
        recipes.FastOptions = few  # type: ignore[attr-defined,assignment]
        fast.SCALE_FACTORS = (1.0, 1.3)  # type: ignore[assignment]
        rounds = partial(data_free.DataFreeOptions, okt_rounds=1, psp_rounds=1, scale_rounds=1)
        data_free.DataFreeOptions = rounds  # type: ignore[assignment,misc]
        once = partial(paper.PaperOptions, okt_rounds=1, psp_rounds=1, rounds=1, sweeps=1)
        paper.PaperOptions = once  # type: ignore[assignment,misc]
        recipes.PaperOptions = once  # type: ignore[attr-defined,assignment]
    predicted: list[Budget] = []

    class Notes(Listener):
        def budgeted(self, budget: Budget) -> None:
            predicted.append(budget)

    text = Calibration(
        str(EXAMPLE / "text" / "calibration.txt"), arguments.num_calibration_samples, arguments.max_seq_length
    )
    started = time.monotonic()
    options = Options(
        str(model),
        out,
        recipe=arguments.recipe,
        calibration=None if arguments.recipe == "data-free" else text,
        text_samples=0,
    )
    summary = convert(options, Notes())
    result = {
        "predicted_bytes": round(predicted[0].memory),
        "predicted_moment": predicted[0].step,
        "base_bytes": round(predicted[0].base),
        "predicted_seconds": round(predicted[0].seconds),
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": peak_resident_bytes(),
        "rank": summary.rank,
        "bits_per_weight": summary.bits_per_weight,
        "bytes_after": summary.bytes_after,
    }
    print(json.dumps(result))


def main() -> int:
    """Run the command line; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="data-free", help="recipe (data-free)")
    parser.add_argument("--shape", choices=SHAPES, default="1.2b", help="shape of the model (1.2b)")
    parser.add_argument("--layers", type=int, default=24, help="number of decoder layers (24)")
    parser.add_argument("--num-calibration-samples", type=int, default=4, help="calibration samples (4)")
    parser.add_argument(
        "--max-seq-length", type=int, default=128, help="tokens of a calibration sample (128)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds of the same steps")
    parser.add_argument("--work", type=Path, help="folder for the model (a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--here", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        model, out = arguments.here
        convert_here(model, out, arguments)
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        model, out = Path(work) / "model", Path(work) / "out"
        size = write_random_model(model, arguments.layers, arguments.shape)
        command = [
            sys.executable,
            "-m",
            "benchmarks.conversion.memory",
            *sys.argv[1:],
            "--here",
            str(model),
            str(out),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        measured = json.loads(done.stdout.strip().splitlines()[-1])
    limit = size // 4 + 10**9 if arguments.recipe == "data-free" and not arguments.quick else None
    ratio = measured["peak_bytes"] / measured["predicted_bytes"]
    print(
        f"model {size / 1e9:.2f} GB, peak memory {measured['peak_bytes'] / 1e9:.2f} GB, predicted "
        f"{measured['predicted_bytes'] / 1e9:.2f} GB ({measured['predicted_moment']}): {ratio:.2f} of it, "
        f"{measured['seconds']:.0f} s" + (f", limit {limit / 1e9:.2f} GB" if limit else "")
    )
    row = {
        "recipe": arguments.recipe,
        "shape": SHAPES[arguments.shape],
        "layers": arguments.layers,
        "windows": arguments.num_calibration_samples,
        "length": arguments.max_seq_length,
        "quick": arguments.quick,
        "model_bytes": size,
        "limit_bytes": limit,
        "peak_over_predicted": round(ratio, 3),
        **measured,
    }
    if arguments.out:
        write_result(arguments.out, [row])
    return int(abs(ratio - 1) > TOLERANCE or (limit is not None and measured["peak_bytes"] > limit))


if __name__ == "__main__":
    sys.exit(main())
