"""The layers that are measured: Qwen3's linears as vLLM fuses them, and a tiny model for the interpreter."""

from dataclasses import dataclass, replace

import torch
from bwla_kernels.factorize import SHARDED_ROTATION_GROUPS, choose_rotation
from bwla_kernels.format import LayerSpec
from bwla_kernels.format.layer import MAX_PLANES

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
        planes: binary planes of the weight.
    """

    name: str
    n: int
    k: int
    preferred_groups: int
    step: str
    rank: int
    planes: int = 1

    @property
    def packed_bytes(self) -> float:
        """Bytes of the packed signs of all planes."""
        return self.planes * self.n * self.k / 8

    def spec(self, rank: int | None = None) -> LayerSpec:
        """Return the layer's spec with the model's rank, or another one."""
        return LayerSpec(
            self.n,
            self.k,
            *choose_rotation(self.k, self.preferred_groups),
            rank=self.rank if rank is None else rank,
            planes=self.planes,
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
"""Qwen3-32B, Qwen3-8B, and a model that the interpreter runs within a second; also, as `32b-2p`, each of them with two,
three or four binary planes a weight (see `with_planes`)."""


def with_planes(model: str, planes: int) -> str:
    """Return the name in MODELS of a model with `planes` binary planes."""
    return model if planes == 1 else f"{model}-{planes}p"


def base_name(model: str) -> str:
    """Return the name of a model without its number of planes."""
    return model.partition("-")[0]


MODELS |= {
    with_planes(model, planes): {name: replace(shape, planes=planes) for name, shape in shapes.items()}
    for model, shapes in MODELS.items()
    for planes in range(2, MAX_PLANES + 1)
}

_DECODER_LAYERS = {"32b": 64, "8b": 36, "tiny": 1}
_VOCABULARY = {"32b": 151936, "8b": 151936, "tiny": 256}
DECODER_LAYERS = {model: _DECODER_LAYERS[base_name(model)] for model in MODELS}
VOCABULARY = {model: _VOCABULARY[base_name(model)] for model in MODELS}


@dataclass(frozen=True)
class Setting:
    """Device and size of the measurements.

    Attributes:
        device: where to run.
        models: names in MODELS, which are measured in full.
        decoded: names of models with several planes, which are measured for one token only.
    """

    device: torch.device
    models: tuple[str, ...]
    decoded: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Return whether the steps run on a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Return the activations' dtype: bfloat16, or float16 in the interpreter, which truncates bfloat16."""
        return torch.bfloat16 if self.on_gpu else torch.float16


GPU = Setting(torch.device("cuda"), ("32b", "8b"), ("32b-2p", "32b-4p"))
CPU = Setting(torch.device("cpu"), ("tiny",), ("tiny-3p",))
