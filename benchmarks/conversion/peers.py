"""Quantize a model with another library, and measure seconds, CPU seconds and peak memory.

    PEER_PYTHON benchmarks/conversion/peers.py RESULT METHOD MODEL IDS GROUP_SIZE THREADS

`speed.py` runs this file with the Python of an environment in which the library is installed, so it imports neither
this project nor, before the method is known, anything but PyTorch. RESULT is the JSON file to write, MODEL a folder,
IDS a safetensors file with the token ids "ids" [S, T] of the calibration samples. Each library has its default
settings, except for the group size, the text, and what the functions below say. Nothing of the model is written.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

BITS = 4
AUTO_ROUND_BATCH = 8

Run = Callable[[], object]


class Meter:
    """Seconds and CPU seconds of this process and its finished children since this object was made."""

    def __init__(self) -> None:
        self._started = self._now()

    def read(self) -> dict[str, float]:
        """Return `seconds`, `cpu_seconds` and `peak_gb`, the peak of the resident memory of this process in GB."""
        seconds, cpu_seconds = (now - then for now, then in zip(self._now(), self._started, strict=True))
        return {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "peak_gb": round(peak_bytes() / 1e9, 3),
        }

    @staticmethod
    def _now() -> tuple[float, float]:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_bytes() -> int:
    """Return the peak of the resident memory of this process, in bytes.

    `ru_maxrss` would include the memory of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def load(model: str) -> Any:
    """Load a model with transformers in the dtype of its checkpoint."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="auto")


# The functions below import their library at once; what they return loads the model and quantizes it.


def llmcompressor_gptq(model: str, ids: Any, group_size: int) -> Run:
    """Return GPTQ with 4 bits of llm-compressor, for the linears of the decoder layers."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

    weights = QuantizationArgs(num_bits=BITS, type="int", strategy="group", group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    samples = {"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)}
    return lambda: oneshot(
        model=load(model),
        dataset=Dataset.from_dict(samples),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )


def gptqmodel_gptq(model: str, ids: Any, group_size: int) -> Run:
    """Return GPTQ with 4 bits of GPTQModel, for the linears of the decoder layers."""
    # GPTQModel needs two workers; on a machine of two cores its default is one, with which it fails.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    from gptqmodel import GPTQModel, QuantizeConfig, extension  # type: ignore[import-not-found]

    extension.load(name="pack_block_cpu")  # It is compiled at its first use on a machine.
    config = QuantizeConfig(bits=BITS, group_size=group_size)
    samples = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} for row in ids]
    return lambda: GPTQModel.load(model, config, device="cpu").quantize(samples)


def autoround_light(model: str, ids: Any, group_size: int) -> Run:
    """Return AutoRound with 4 bits and the settings of its command `auto-round-light`: 50 steps, learning rate 5e-3."""
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    settings = {
        "scheme": "W4A16",
        "group_size": group_size,
        "iters": 50,
        "lr": 5e-3,
        "nsamples": len(ids),
        "seqlen": ids.shape[1],
        "batch_size": AUTO_ROUND_BATCH,
        "dataset": [{"input_ids": batch} for batch in ids.split(AUTO_ROUND_BATCH)],
        "device_map": "cpu",
    }
    return lambda: AutoRound(load(model), AutoTokenizer.from_pretrained(model), **settings).quantize()


PEERS: dict[str, tuple[str, Callable[[str, Any, int], Run]]] = {
    "llmcompressor-gptq": ("llmcompressor", llmcompressor_gptq),
    "gptqmodel-gptq": ("gptqmodel", gptqmodel_gptq),
    "autoround-light": ("auto-round", autoround_light),
}
"""Method -> the package that implements it, and the function that returns what runs it."""


def main() -> None:
    """Run the method that the command line names."""
    result, method, model, ids, group_size, threads = sys.argv[1:]
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(int(threads))
    package, prepare = PEERS[method]
    versions = {name: version(name) for name in (package, "torch", "transformers")}
    try:
        run = prepare(model, load_file(ids)["ids"], int(group_size))
        meter = Meter()
        run()
    except Exception as error:  # whatever a library raises is why it is missing in the result
        reason = " ".join(str(error).split())
        raise SystemExit(f"{package} {versions[package]}: {type(error).__name__}: {reason}") from error
    measured = {**meter.read(), "versions": versions}
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
