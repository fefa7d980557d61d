"""The layers that are measured: Qwen3's linears as vLLM fuses them, and a tiny model for the interpreter."""

from dataclasses import dataclass

import torch
from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS, choose_rotation
from bwla_kernels.format import LayerSpec

PLAIN, ADD_NORM, SILU_MUL = "", "add+norm", "silu*mul"
"""What vLLM computes before a layer, and BWLA where it loads the layer's input."""


@dataclass(frozen=True)
class Shape:
    """A linear of a model.

    Attributes:
        name: qkv, o, gate_up or down.
        n, k: rows and columns.
        wished: rotation blocks asked of `choose_rotation`.
        step: what stands before it.
        rank: low-rank term, as `--rank auto` gives the model.
    """

    name: str
    n: int
    k: int
    wished: int
    step: str
    rank: int

    def spec(self, rank: int | None = None) -> LayerSpec:
        """The layer's sizes at the model's rank, or at another one."""
        return LayerSpec(
            self.n, self.k, *choose_rotation(self.k, self.wished), rank=self.rank if rank is None else rank
        )


def _model(hidden: int, heads: int, kv: int, intermediate: int, blocks: int, rank: int) -> dict[str, Shape]:
    """The four linears of a decoder layer; `heads` and `kv` are the widths of q and of k (and v)."""
    shapes = (
        Shape("qkv", heads + 2 * kv, hidden, 1, ADD_NORM, rank),
        Shape("o", hidden, heads, blocks, PLAIN, rank),
        Shape("gate_up", 2 * intermediate, hidden, 1, ADD_NORM, rank),
        Shape("down", hidden, intermediate, blocks, SILU_MUL, rank),
    )
    return {shape.name: shape for shape in shapes}


MODELS = {
    "32b": _model(5120, 8192, 1024, 25600, SHARDED_ROTATION_GROUPS, 32),
    "8b": _model(4096, 4096, 1024, 12288, SHARDED_ROTATION_GROUPS, 16),
    "tiny": _model(64, 64, 32, 64, 2, 5),
}
"""Qwen3-32B, Qwen3-8B and what the interpreter can do in a second."""

DECODER_LAYERS = {"32b": 64, "8b": 36, "tiny": 1}
VOCABULARY = {"32b": 151936, "8b": 151936, "tiny": 256}


@dataclass(frozen=True)
class Setting:
    """Where and at what size the steps run."""

    device: torch.device
    models: tuple[str, ...]

    @property
    def on_gpu(self) -> bool:
        """Whether there are graphs, caches and clocks to measure with."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: bfloat16; the interpreter cuts it off instead of rounding, so there float16."""
        return torch.bfloat16 if self.on_gpu else torch.float16


GPU = Setting(torch.device("cuda"), ("32b", "8b"))
CPU = Setting(torch.device("cpu"), ("tiny",))
