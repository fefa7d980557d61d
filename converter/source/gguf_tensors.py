"""The tensors of a GGUF file under the names that transformers stores, with what llama.cpp has changed undone.

gguf's table of names belongs to the names in a checkpoint, which llama.cpp's converter reads; so the names that
transformers stores are looked up in it, those of experts without their number.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import gguf
import torch
from bwla_converter.source.gguf_config import architecture_of
from bwla_converter.source.gguf_file import GGUFFile
from bwla_converter.source.gguf_models import reorder
from bwla_converter.source.gguf_models.architectures import Architecture
from bwla_converter.source.gguf_types import exact_dtype
from bwla_converter.source.observe.names import stored_shapes, tied_names
from bwla_converter.source.problems import raise_if_any
from torch import Tensor
from transformers import PreTrainedModel

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that become settings in config.json, see `gguf_models.rope`."""

FLOAT32 = "e_score_correction_bias"
"""Biases by which experts are chosen, stored in float32: their differences are small beside their values."""

SUFFIXES = (".weight", ".bias", ".scale")

NUMBERED = re.compile(r"(?P<before>.*\.(?:experts|[qk]_layernorm\.norms))\.(?P<index>\d+)(?P<after>\..*)")
"""Names of tensors that llama.cpp stores as one for all experts, or for all heads."""

FUSED_EXPERTS = re.compile(r"(blk\.\d+)\.ffn_(gate|up)_exps\.(weight|bias)")
"""Names of experts' tensors that newer files may have as one, `ffn_gate_up_exps`."""

Join = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Origin:
    """Where a stored tensor comes from.

    Attributes:
        names: the tensors in the file.
        shape: its shape.
        part: number of the part of the file's tensor along its first dimension, and the number of parts.
        join: what makes one tensor of those in the file; None for one that only needs its shape.
        change: what undoes llama.cpp's change of the values.
        dtype: its dtype.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    part: tuple[int, int] = (0, 1)
    join: Join | None = None
    change: Callable[[Tensor, object], Tensor] | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


def tensor_origins(file: GGUFFile, model: PreTrainedModel) -> dict[str, Origin]:
    """Return the origin of every tensor that a checkpoint of a model stores, by its name.

    Args:
        file: the file.
        model: the model of its config.json, on the meta device.

    Raises:
        SourceError: the list of all tensors that are missing, have another shape, or are not part of the model.
    """
    architecture = architecture_of(file)
    finder = _Finder(file, architecture, model)
    tied = tied_names(model)
    origins: dict[str, Origin] = {}
    problems: list[str] = []
    used: set[str] = set()
    for name, shape in stored_shapes(model).items():
        origin = finder.find(name, shape)
        missing = [stored for stored in origin.names if stored not in file.tensors]
        used.update(origin.names)
        if not missing:
            origins[name] = origin
            problems += _shape_problems(file, origin)
        elif name not in tied:
            problems.append(f"{missing[0]} is missing ({name}), expected shape {list(shape)}")
    left_out = architecture.left_out(model.config.get_text_config())
    for stored in sorted(file.tensors.keys() - used - set(ROPE_TENSORS)):
        if left_out is None or not re.fullmatch(left_out, stored):
            problems.append(f"{stored} is not a tensor of {type(model).__name__}")
    raise_if_any(file.path, problems)
    return origins


class _Finder:
    """Finds the origins of the tensors of one model."""

    def __init__(self, file: GGUFFile, architecture: Architecture, model: PreTrainedModel) -> None:
        key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.gguf)
        self._file, self._architecture = file, architecture
        self._table = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)

    def find(self, name: str, shape: tuple[int, ...]) -> Origin:
        """Return the origin of a stored tensor, whose names the file may lack."""
        joined = self._joined(name, shape)
        if joined is not None:
            return joined
        match = NUMBERED.fullmatch(name)
        stored = self._look_up(match["before"].removesuffix(".norms") + match["after"] if match else name)
        part = (0, 1)
        if match:
            count = self._file.shape(stored)[0] if stored in self._file.tensors else 1
            part = (int(match["index"]), count)
            both = FUSED_EXPERTS.sub(r"\1.ffn_gate_up_exps.\3", stored)
            if stored not in self._file.tensors and both in self._file.tensors:
                part = (2 * part[0] + (".ffn_up_" in stored), 2 * self._file.shape(both)[0])
                stored = both
        change = next(
            (undo for pattern, undo in self._architecture.values if re.search(pattern, stored)), None
        )
        return Origin((stored,), shape, part, change=change, dtype=self._dtype(name, stored))

    def _dtype(self, name: str, stored: str) -> torch.dtype:
        if name.endswith(FLOAT32):
            return torch.float32
        tensor = self._file.tensors.get(stored)
        return torch.bfloat16 if tensor is None else exact_dtype(tensor.tensor_type)

    def _look_up(self, name: str) -> str:
        """Return llama.cpp's name of a stored tensor; the name itself if gguf's table lacks it."""
        for pattern, replacement in self._architecture.names:
            name = re.sub(pattern, replacement, name)
        found = self._table.get_name(name, try_suffixes=SUFFIXES)
        # Parameters of their own, such as Gemma 4's layer_scalar, have a suffix in the file all the same.
        if found is not None and found not in self._file.tensors and f"{found}.weight" in self._file.tensors:
            return f"{found}.weight"
        return found or name

    def _joined(self, name: str, shape: tuple[int, ...]) -> Origin | None:
        """Return the origin of a tensor with all experts, which llama.cpp stores otherwise; None for other tensors."""
        module, _, parameter = name.rpartition(".experts.")
        if not module or parameter.split(".")[0].isdigit():
            return None
        start = self._look_up(f"{module}.experts.down_proj.weight").removesuffix("down_exps.weight")
        kind = "bias" if parameter.endswith("_bias") else "weight"
        both = (f"{start}gate_exps.{kind}", f"{start}up_exps.{kind}")
        if self._architecture.gguf == "gpt-oss":
            if parameter.startswith("gate_up_proj"):
                return Origin(both, shape, join=reorder.interleave_gate_up)
            join = reorder.transpose_experts if kind == "weight" else None
            return Origin((f"{start}down_exps.{kind}",), shape, join=join)
        if parameter == "gate_up_proj" and both[0] in self._file.tensors:
            return Origin(both, shape, join=reorder.join_gate_up)
        return None


def _shape_problems(file: GGUFFile, origin: Origin) -> Iterator[str]:
    """Yield a message if the tensors in the file do not have the shapes that make up the stored one."""
    if origin.join is not None:
        found = sum(prod(file.shape(name)) for name in origin.names)
        if found != origin.size:
            yield f"{origin.names[0]}: expected {origin.size} values with those it is joined with, found {found}"
        return
    name, (index, count) = origin.names[0], origin.part
    shape = file.shape(name)
    if count == 1:
        right = _without_ones(shape) == _without_ones(origin.shape)
    else:
        right = index < count and prod(shape) == count * origin.size and shape[-1] == origin.shape[-1]
    if not right:
        parts = f" in each of {count} parts" if count > 1 else ""
        yield f"{name}: expected shape {list(origin.shape)}{parts}, found {list(shape)}"


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without dimensions of 1, such as those of convolutions, which llama.cpp does not store."""
    return tuple(size for size in shape if size != 1)


def read_tensor(file: GGUFFile, origin: Origin, model: PreTrainedModel) -> Tensor:
    """Return a stored tensor as transformers expects it, in the dtype of its origin."""
    # What has one dimension is small and may be computed with: it is rounded at the end.
    small = len(file.shape(origin.names[0])) == 1
    dtype = torch.float32 if small else origin.dtype
    tensors = [file.read(name, part=origin.part, dtype=dtype) for name in origin.names]
    tensor = tensors[0] if origin.join is None else origin.join(tensors)
    if origin.change is not None:
        tensor = origin.change(tensor, model.config.get_text_config())
    return tensor.reshape(origin.shape).to(origin.dtype)
