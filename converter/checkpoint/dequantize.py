"""Dequantize a BWLA checkpoint into a plain Hugging Face model, one decoder layer at a time.

The weights are exactly those that the quantized linears represent, but the plain model does not quantize activations.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bwla_converter.checkpoint.contents import Contents, dtype_name, read_contents
from bwla_converter.checkpoint.dummy import config_source
from bwla_converter.checkpoint.layout import check_space, read_int8
from bwla_converter.checkpoint.merge import part_name
from bwla_converter.checkpoint.writer import OutputError, atomic_output
from bwla_converter.common.tensors import tensor_bytes
from bwla_converter.common.weights import CHUNK_ELEMENTS, dequantized_weight
from bwla_converter.planning.disk import merging_bytes
from bwla_converter.source.observe.experts import Experts
from bwla_kernels.errors import BWLAError
from bwla_kernels.format import validate_layer
from bwla_kernels.format.experts import stored_names
from bwla_kernels.format.folder import int8_modules, read_json, read_tensors
from bwla_kernels.head import dequantize_rows
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LAYER = re.compile(r".*?\.\d+\.")
"""The beginning of the names of a decoder layer's tensors."""


@dataclass(frozen=True)
class DequantizedModel:
    """Size of a dequantized model: bytes of its tensors, number of dequantized linears."""

    bytes: int
    linears: int


def write_dequantized(
    checkpoint: Path,
    out: Path,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    on_linear: Callable[[str], None] = lambda name: None,
) -> DequantizedModel:
    """Write the dequantized `checkpoint` to `out` atomically. One decoder layer is in memory at a time.

    Args:
        checkpoint: a BWLA checkpoint.
        out: the folder to create.
        dtype: dtype of all floating-point tensors, a key of `DTYPES`.
        overwrite: replace `out` if it holds a model.
        on_linear: called with the name of each dequantized linear.

    Raises:
        BWLAError: the dtype is unknown, the checkpoint is damaged, or the output cannot be written.
    """
    if dtype not in DTYPES:
        raise BWLAError(f"--dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}: choose one of them")
    if out.resolve() == checkpoint.resolve():
        raise OutputError(f"{out}: is the checkpoint itself and would be overwritten: choose another output")
    contents = read_contents(checkpoint)
    experts = _stacked_experts(checkpoint) if contents.format.experts is not None else {}
    size = dequantized_bytes(contents, DTYPES[dtype])
    needed = size + merging_bytes(size, 0)
    check_space(out, needed)
    with atomic_output(out, overwrite, needed) as writer:
        for index, names in enumerate(_parts(contents)):
            tensors = _dequantized(contents, names, DTYPES[dtype], on_linear)
            layer = _LAYER.match(names[0])
            if layer is not None and layer[0] in experts:
                tensors = experts[layer[0]].stack(layer[0], tensors)
            writer.write_shard(part_name(index), tensors)
        config = read_json(checkpoint / "config.json")
        del config["quantization_config"]
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        writer.finish(checkpoint, config)
        writer.merge_parts()
        return DequantizedModel(writer.total_size, len(contents.all_specs))


def _stacked_experts(checkpoint: Path) -> dict[str, Experts]:
    """Return the experts that the plain model stores in stacked tensors, by the prefix of their decoder layer."""
    source = config_source(checkpoint)
    return {
        f"{source.structure.layer_name(index)}.": experts
        for index, experts in source.structure.experts.items()
        if experts.stacked
    }


def dequantized_bytes(contents: Contents, dtype: torch.dtype) -> int:
    """Return the bytes of the dequantized model's tensors."""
    total = sum(
        tensor_bytes((spec.out_features, spec.in_features), dtype) for spec in contents.all_specs.values()
    )
    for name, entry in contents.entries.items():
        module, _, key = name.rpartition(".")
        if module in contents.all_specs and key != "bias":
            continue
        if key != "weight_scale":  # of an 8-bit head or embedding
            total += tensor_bytes(entry.shape, dtype)
    return total


def _parts(contents: Contents) -> list[list[str]]:
    """Return the names of all stored tensors: those of each decoder layer, and those of each other module."""
    parts: dict[str, list[str]] = {}
    for name in contents.entries:
        layer = _LAYER.match(name)
        parts.setdefault(layer[0] if layer else name.rpartition(".")[0], []).append(name)
    return list(parts.values())


def _dequantized(
    contents: Contents, names: Sequence[str], dtype: torch.dtype, on_linear: Callable[[str], None]
) -> dict[str, Tensor]:
    """Return the dequantized model's tensors that are made from the stored tensors `names`."""

    int8 = int8_modules(contents.format, contents.entries)
    own = [name for name in names if name.rpartition(".")[0] not in int8]
    stored = read_tensors(contents.folder, contents.entries, own)
    tensors: dict[str, Tensor] = {}
    for name in names:
        module, _, key = name.rpartition(".")
        if module in contents.all_specs:
            if key == "weight_packed":
                spec = contents.all_specs[module]
                layer = {key: stored[source] for key, source in stored_names(module, spec).items()}
                validate_layer(module, layer, spec)
                tensors[f"{module}.weight"] = _finite(
                    f"{module}.weight", dequantized_weight(layer, spec, dtype)
                )
                if spec.bias:
                    tensors[f"{module}.bias"] = _finite(f"{module}.bias", layer["bias"].to(dtype))
                on_linear(module)
        elif module in int8:
            if key == "weight_int8":
                codes = read_int8(contents.folder, contents.entries, module)
                tensors[f"{module}.weight"] = _finite(f"{module}.weight", _dequantized_int8(codes, dtype))
        else:
            tensor = stored[name]
            tensors[name] = _finite(name, tensor.to(dtype)) if tensor.is_floating_point() else tensor
    return tensors


def _dequantized_int8(stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight [V, K] of an 8-bit head or embedding in `dtype`, computed a few rows at a time."""
    rows, columns = stored["weight_int8"].shape
    parts = torch.arange(rows).split(max(1, CHUNK_ELEMENTS // columns))
    return torch.cat([dequantize_rows(**stored, ids=part, dtype=dtype) for part in parts])


def _finite(name: str, tensor: Tensor) -> Tensor:
    """Return `tensor`; raise if conversion to its dtype made values infinite."""
    if not bool(torch.isfinite(tensor).all()):
        raise BWLAError(
            f"{name}: expected values in the range of {dtype_name(tensor.dtype)}, found larger ones: "
            "choose --dtype bfloat16 or float32"
        )
    return tensor
