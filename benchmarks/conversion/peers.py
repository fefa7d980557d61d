"""Quantize a model with another library, and measure seconds, CPU seconds and peak memory, and perplexity if asked for.

    PEER_PYTHON benchmarks/conversion/peers.py RESULT METHOD MODEL SAMPLES BITS GROUP_SIZE THREADS

`speed.py` and `frontier.py` run this file with the Python of an environment in which the library is installed, so it
imports neither this project nor, before the method is known, anything but PyTorch. RESULT is the JSON file to write,
MODEL a folder, SAMPLES a safetensors file with the token ids "ids" [S, T] of the calibration samples. If it also holds
"windows" [W, T], the perplexity of the quantized model on them is measured, after the clock has stopped. Each library
has its default settings, except for bits and group size, the text, and what the functions below say. Nothing of the
model is written.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

AUTO_ROUND_BATCH = 8
SCALE_BITS = 16
CHECKED_ROWS = 64
"""Rows of each linear whose numbers of distinct values are counted."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """What a library does.

    Attributes:
        model: folder of the model.
        ids: token ids [S, T] of the calibration samples.
        bits: bits of a code.
        group_size: weights of a row that share a scale.
    """

    model: str
    ids: Any
    bits: int
    group_size: int


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


# The functions below import their library at once; what they return loads the model, quantizes it and returns it.


def llmcompressor_gptq(task: Task, symmetric: bool = True) -> Run:
    """Return GPTQ of llm-compressor, for the linears of the decoder layers."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]

    weights = QuantizationArgs(
        num_bits=task.bits, type="int", strategy="group", group_size=task.group_size, symmetric=symmetric
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    samples = {"input_ids": task.ids.tolist(), "attention_mask": [[1] * task.ids.shape[1]] * len(task.ids)}
    return lambda: oneshot(
        model=load(task.model),
        dataset=Dataset.from_dict(samples),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=task.ids.shape[1],
        num_calibration_samples=len(task.ids),
    )


def llmcompressor_gptq_asymmetric(task: Task) -> Run:
    """Return GPTQ of llm-compressor with a zero point for each group, which is the better choice for 2 and 3 bits."""
    return llmcompressor_gptq(task, symmetric=False)


def gptqmodel_gptq(task: Task) -> Run:
    """Return GPTQ of GPTQModel, for the linears of the decoder layers."""
    # GPTQModel needs two workers; on a machine of two cores its default is one, with which it fails.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, (os.cpu_count() or 1) // 2)))
    from gptqmodel import GPTQModel, QuantizeConfig, extension  # type: ignore[import-not-found]

    extension.load(name="pack_block_cpu")  # It is compiled at its first use on a machine.
    config = QuantizeConfig(bits=task.bits, group_size=task.group_size)
    samples = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} for row in task.ids]
    return lambda: GPTQModel.load(task.model, config, device="cpu").quantize(samples)


def autoround_light(task: Task) -> Run:
    """Return AutoRound with the settings of its command `auto-round-light`: 50 steps, learning rate 5e-3."""
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    settings = {
        "scheme": f"W{task.bits}A16",
        "group_size": task.group_size,
        "iters": 50,
        "lr": 5e-3,
        "nsamples": len(task.ids),
        "seqlen": task.ids.shape[1],
        "batch_size": AUTO_ROUND_BATCH,
        "dataset": [{"input_ids": batch} for batch in task.ids.split(AUTO_ROUND_BATCH)],
        "device_map": "cpu",
    }
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    return lambda: AutoRound(load(task.model), tokenizer, **settings).quantize()[0]


def hqq(task: Task) -> Run:
    """Return HQQ, which uses no calibration samples, for the linears of the decoder layers."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig  # type: ignore[import-not-found]
    from hqq.models.hf.base import AutoHQQHFModel  # type: ignore[import-not-found]

    config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group_size, axis=1)

    def quantize() -> Any:
        model = load(task.model)
        # In float32, which loses nothing and is several times faster on CPUs without bfloat16 instructions.
        AutoHQQHFModel.quantize_model(model.float(), config, compute_dtype=torch.float32, device="cpu")
        return model

    return quantize


@dataclass(frozen=True)
class Peer:
    """A method of another library.

    Attributes:
        package: the package that implements it.
        prepare: returns what runs it.
        dequantizes: whether the quantized model computes with dequantized weights on a CPU, so that its perplexity can
            be measured in the same process.
        zero_point_bits: stored bits of a group's zero point, for codes of that many bits; they are those of the
            formats that the libraries write, with zero points packed to the width of the codes.
    """

    package: str
    prepare: Callable[[Task], Run]
    dequantizes: bool = True
    zero_point_bits: Callable[[int], int] = lambda _: 0

    def bits_per_weight(self, bits: int, group_size: int) -> float:
        """Return the stored bits per weight: the code, and the group's scale and zero point."""
        return bits + (SCALE_BITS + self.zero_point_bits(bits)) / group_size


PEERS: dict[str, Peer] = {
    "llmcompressor-gptq": Peer("llmcompressor", llmcompressor_gptq),
    "llmcompressor-gptq-asym": Peer("llmcompressor", llmcompressor_gptq_asymmetric, True, lambda bits: bits),
    "gptqmodel-gptq": Peer("gptqmodel", gptqmodel_gptq, dequantizes=False),
    "autoround-light": Peer("auto-round", autoround_light),
    "hqq": Peer("hqq", hqq, True, lambda _: 16),
}
"""The methods by name."""


def count_levels(model: Any, group_size: int) -> int:
    """Return the largest number of distinct weights in a group, over the first rows of the decoder layers' linears."""
    most = 0
    for name, module in model.named_modules():
        if ".layers." not in f".{name}" or not hasattr(module, "in_features"):
            continue
        weight = module.weight if getattr(module, "weight", None) is not None else module.dequantize()
        groups = weight.detach()[:CHECKED_ROWS].float().reshape(-1, group_size).sort(dim=1).values
        most = max(most, int((groups.diff(dim=1) != 0).sum(1).max()) + 1)
    return most


def perplexity(model: Any, windows: Any, batch: int = 4) -> float:
    """Return exp of the mean negative log-likelihood of the next token, as `bwla_converter.evaluation.perplexity` does.

    Args:
        model: a causal language model.
        windows: token ids [W, T]; every token but the first of a window is predicted from those before it.
        batch: number of windows in a batch.
    """
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for rows in windows.split(batch):
            logits, targets = model(rows).logits[:, :-1].float(), rows[:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            total += loss.item()
            count += targets.numel()
    return math.exp(total / count)


def evaluate(model: Any, windows: Any, task: Task) -> dict[str, float]:
    """Return `ppl`, the perplexity of a quantized model.

    Raises:
        ValueError: a group has more distinct weights than its codes can express, so the model is not the quantized one;
            or the perplexity is not finite.
    """
    levels = count_levels(model, task.group_size)
    if not 1 < levels <= 2**task.bits:
        raise ValueError(
            f"expected 2 to {2**task.bits} distinct weights in a group of {task.group_size}, found {levels}: "
            "the library has not returned dequantized weights"
        )
    ppl = perplexity(model.eval(), windows)
    if not math.isfinite(ppl):
        raise ValueError(f"expected a finite perplexity of the quantized model, found {ppl}")
    return {"ppl": ppl}


def main() -> None:
    """Run the method that the command line names."""
    result, method, model, samples, bits, group_size, threads = sys.argv[1:]
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(int(threads))
    peer = PEERS[method]
    versions = {name: version(name) for name in (peer.package, "torch", "transformers")}
    tensors = load_file(samples)
    task = Task(model, tensors["ids"], int(bits), int(group_size))
    try:
        run = peer.prepare(task)
        meter = Meter()
        quantized = run()
        measured: dict[str, Any] = {**meter.read(), "versions": versions}
        if "windows" in tensors:
            measured |= evaluate(quantized, tensors["windows"], task)
    except Exception as error:  # whatever a library raises is why it is missing in the result
        reason = " ".join(str(error).split())
        raise SystemExit(
            f"{peer.package} {versions[peer.package]}: {type(error).__name__}: {reason}"
        ) from error
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
