"""The layers that are measured: Qwen3's linears as vLLM fuses them, and a tiny model for the interpreter."""

from dataclasses import dataclass

import torch
from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS, choose_rotation
from bwla_kernels.format import LayerSpec

PLAIN, ADD_NORM, SILU_MUL = "", "add+norm", "silu*mul"
"""Operations before a layer that vLLM computes separately and BWLA while it loads the layer's input."""


@dataclass(frozen=True)
class Shape:
    """A linear of a model.

    Attributes:
        name: qkv, o, gate_up or down.
        n, k: rows and columns.
        preferred_groups: preferred number of rotation groups.
        step: operation before the layer.
        rank: rank of the low-rank correction, as `--rank auto` chooses it for the model.
    """

    name: str
    n: int
    k: int
    preferred_groups: int
    step: str
    rank: int

    def spec(self, rank: int | None = None) -> LayerSpec:
        """Return the layer's spec with the model's rank, or another one."""
        return LayerSpec(
            self.n,
            self.k,
            *choose_rotation(self.k, self.preferred_groups),
            rank=self.rank if rank is None else rank,
        )


def _model(hidden: int, heads: int, kv: int, intermediate: int, blocks: int, rank: int) -> dict[str, Shape]:
    """Return the four linears of a decoder layer; `heads` and `kv` are the widths of q and of k and v."""
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
"""Qwen3-32B, Qwen3-8B, and a model that the interpreter runs within a second."""

DECODER_LAYERS = {"32b": 64, "8b": 36, "tiny": 1}
VOCABULARY = {"32b": 151936, "8b": 151936, "tiny": 256}


@dataclass(frozen=True)
class Setting:
    """Device and size of the measurements."""

    device: torch.device
    models: tuple[str, ...]

    @property
    def on_gpu(self) -> bool:
        """Return whether the steps run on a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Return the activations' dtype: bfloat16, or float16 in the interpreter, which truncates bfloat16."""
        return torch.bfloat16 if self.on_gpu else torch.float16


GPU = Setting(torch.device("cuda"), ("32b", "8b"))
CPU = Setting(torch.device("cpu"), ("tiny",))
