"""Peak memory of a conversion: a random sharded model is written and converted in a process of its own.

    python benchmarks/convert_memory.py --out benchmarks/results/convert_memory.json

The limit that must hold: a quarter of the model's bytes plus 1 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import write_result
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


def write_random_model(folder: Path, layers: int, hidden: int, intermediate: int) -> int:
    """Write a random Qwen3 model of bfloat16 weights, one shard a block; returns the tensors' bytes."""
    config = AutoConfig.for_model(
        "qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 256,
        head_dim=128,
        vocab_size=32000,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    weight_map, total = {}, 0
    for file, members in shards.items():
        tensors = {
            name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            for name, shape in members.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> int:
    """Command line; returns 1 where the limit does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--work", type=Path, help="folder for the model (a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        model, out = Path(work) / "model", Path(work) / "out"
        size = write_random_model(model, arguments.layers, arguments.hidden, arguments.intermediate)
        command = [str(Path(sys.executable).with_name("bwla-convert")), str(model), str(out)]
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        report = json.loads((out / "bwla_report.json").read_text())
    limit = size // 4 + 10**9
    print(
        f"model {size / 1e9:.2f} GB, peak memory {peak / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB, {seconds:.0f} s"
    )
    row = {
        "layers": arguments.layers,
        "hidden": arguments.hidden,
        "intermediate": arguments.intermediate,
        "model_bytes": size,
        "peak_bytes": peak,
        "limit_bytes": limit,
        "seconds": round(seconds, 1),
        "rank": report["rank"],
        "bits_per_weight": report["bits_per_weight"],
        "bytes_after": report["bytes_after"],
    }
    if arguments.out:
        write_result(arguments.out, [row])
    return int(peak > limit)


if __name__ == "__main__":
    sys.exit(main())
