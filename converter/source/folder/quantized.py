"""Source models whose weights are quantized: which methods are known, and how their tensors are read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bwla_converter.source.folder import bitnet, fp8, mlx, mxfp4
from bwla_kernels.errors import SourceError
from bwla_kernels.format.files import Entry, read_tensors
from torch import Tensor

Settings = Mapping[str, Any]
Entries = Mapping[str, Entry]


@dataclass(frozen=True)
class Method:
    """A way in which quantized weights are stored.

    Attributes:
        name: its name, for messages.
        matches: whether the `quantization_config` of a model describes it.
        check: raises SourceError if a model with these settings cannot be read; the second argument names its config.
        entries: the tensors as they are read, without scales, from those that are stored.
        problems: messages about stored tensors that do not fit each other.
        parts: names of the tensors that a weight is stored as; empty for one that is stored as it is.
        dequantize: the weight, from these tensors.
    """

    name: str
    matches: Callable[[Settings], bool]
    check: Callable[[Settings, str], None]
    entries: Callable[[Entries, Settings], Entries]
    problems: Callable[[Entries, Settings], Iterator[str]]
    parts: Callable[[str, Entries], tuple[str, ...]]
    dequantize: Callable[[Sequence[Tensor], Settings], Tensor]


def accept(settings: Settings, path: str) -> None:
    """Accept all settings of a method."""


FP8 = Method(
    "fp8",
    fp8.is_fp8,
    accept,
    lambda stored, settings: fp8.dequantized_entries(stored),
    lambda stored, settings: fp8.scale_problems(stored, fp8.scale_block(settings)),
    fp8.parts_of,
    lambda parts, settings: fp8.dequantize(parts[0], parts[1], fp8.scale_block(settings)),
)
METHODS = (
    FP8,
    Method(
        "MXFP4",
        mxfp4.is_mxfp4,
        accept,
        lambda stored, settings: mxfp4.dequantized_entries(stored),
        lambda stored, settings: mxfp4.packed_problems(stored),
        lambda name, stored: mxfp4.packed_names(name, stored) or (),
        lambda parts, settings: mxfp4.dequantize(parts[0], parts[1]),
    ),
    Method(
        "BitNet",
        bitnet.is_bitnet,
        bitnet.check_config,
        lambda stored, settings: bitnet.dequantized_entries(stored),
        lambda stored, settings: bitnet.packed_problems(stored),
        bitnet.parts_of,
        lambda parts, settings: bitnet.dequantize(parts[0], parts[1], bitnet.linear_class(settings)),
    ),
    Method(
        "MLX",
        mlx.is_mlx,
        mlx.check_config,
        mlx.dequantized_entries,
        mlx.packed_problems,
        mlx.parts_of,
        lambda parts, settings: mlx.dequantize(parts[0], parts[1], parts[2], settings["bits"]),
    ),
)


def method_of(quantization: Settings) -> Method:
    """Return how the weights of a model are stored.

    Args:
        quantization: from `quantization_config`. If it is empty, fp8 weights are recognized by their dtype.
    """
    return next((method for method in METHODS if quantization and method.matches(quantization)), FP8)


def quantization_config(config: Mapping[str, Any], path: str) -> Settings:
    """Return what config.json says about quantized weights that can be read; empty for an unquantized model.

    Args:
        config: contents of config.json. MLX calls the entry `quantization`.
        path: its path, for messages.

    Raises:
        SourceError: the model is quantized with another method.
    """
    quantization = config.get("quantization_config") or config.get("quantization") or {}
    if not isinstance(quantization, Mapping):
        raise SourceError(
            f"{path}: expected quantization_config to be an object, found {quantization!r:.60}: restore config.json"
        )
    if quantization and not method_of(quantization).matches(quantization):
        known = f"{', '.join(method.name for method in METHODS[:-1])} or {METHODS[-1].name}"
        method = quantization.get("quant_method", "an unnamed method")
        raise SourceError(
            f"{path}: expected an unquantized model, or {known} weights, found one quantized with {method}: convert "
            "the original checkpoint instead"
        )
    method_of(quantization).check(quantization, path)
    return quantization


def entries_as_read(stored: Entries, quantization: Settings) -> Entries:
    """Return the tensors as `read_dequantized` returns them: weights in a float dtype, without scales."""
    return method_of(quantization).entries(stored, quantization) if quantization else stored


def scale_problems(stored: Entries, quantization: Settings) -> Iterator[str]:
    """Yield a message for every quantized weight whose scales are missing or do not fit."""
    yield from method_of(quantization).problems(stored, quantization)


def read_dequantized(
    folder: Path, stored: Entries, names: list[str], quantization: Settings
) -> dict[str, Tensor]:
    """Read tensors by name, with quantized weights in a float dtype.

    Args:
        folder: the checkpoint folder.
        stored: its tensors.
        names: which ones to read, by the names that `entries_as_read` gives them.
        quantization: from `quantization_config`.

    Raises:
        SourceError: a stored value is not one of its method.
    """
    method = method_of(quantization)
    parts = {name: method.parts(name, stored) or (name,) for name in names}
    tensors = read_tensors(
        folder, stored, list(dict.fromkeys(part for found in parts.values() for part in found))
    )
    read = {}
    for name, found in parts.items():
        try:
            read[name] = (
                tensors[name]
                if found == (name,)
                else method.dequantize([tensors[part] for part in found], quantization)
            )
        except SourceError as error:
            raise SourceError(f"{name}: {error}") from None
    return read
