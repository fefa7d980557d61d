"""Compare the stored tensors of a model with those that transformers expects."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from bwla_converter.source.observe.names import COMPUTED, StoredNames
from bwla_kernels.format.experts import expert_of
from bwla_kernels.format.files import Entry, Scan
from bwla_kernels.format.layer import FLOAT_DTYPES


def tensor_problems(
    entries: Mapping[str, Entry], scan: Scan, names: StoredNames, tied: Mapping[str, str], architecture: str
) -> Iterator[str]:
    """Yield a message for every tensor that is missing, superfluous, or of another shape or dtype than expected.

    Args:
        entries: the tensors as they are read, fp8 weights as bfloat16.
        scan: the tensors as they are stored, and those of files that are missing.
        names: how the model's tensors are stored.
        tied: the tensors that need not be stored, because others replace them.
        architecture: the model's class.
    """
    found = names.by_parameter(entries)
    lost = names.by_parameter(scan.lost)
    for parameter, shape in names.parameters.items():
        stored = found.get(parameter, [])
        if not stored:
            if parameter not in tied and parameter not in lost:
                yield f"{parameter} is missing, expected shape {list(shape)}"
            continue
        if parameter not in lost:
            yield from _shape_problems(parameter, shape, stored, entries, names)
        for name in stored:
            dtype = entries[name].dtype
            if dtype not in FLOAT_DTYPES and scan.entries[name].dtype != torch.float8_e4m3fn:
                yield f"{entries[name].file}: {name}: expected bfloat16, float16, float32 or scaled fp8, found {dtype}"
    known = {name for stored in found.values() for name in stored}
    for name, entry in entries.items():
        # Some old checkpoints store buffers that the model computes itself.
        if name not in known and not name.endswith(COMPUTED) and not names.is_unused(name):
            yield f"{entry.file}: {name} is not a tensor of {architecture}"


def _shape_problems(
    parameter: str,
    shape: tuple[int, ...],
    stored: Sequence[str],
    entries: Mapping[str, Entry],
    names: StoredNames,
) -> Iterator[str]:
    """Yield a message if a parameter's stored tensors do not have the shapes that make up its own."""
    first = entries[stored[0]]
    if names.parameter(stored[0])[1] is None:
        if first.shape != shape:
            yield f"{first.file}: {stored[0]}: expected shape {list(shape)}, found {list(first.shape)}"
        return
    tensors = {name: torch.empty(entries[name].shape, device="meta") for name in stored}
    try:
        joined = tuple(names.convert(tensors)[parameter].shape)
    except Exception as cause:  # whatever transformers' conversions raise for other shapes
        joined, reason = (), f" ({' '.join(str(cause).split()):.100})"
    else:
        reason = ""
    if joined != shape:
        yield (
            f"{first.file}: {stored[0]}: expected {len(stored)} tensors that make up {parameter} of shape "
            f"{list(shape)}, found shape {list(first.shape)} in the first{reason}"
        )
    else:
        yield from _number_problems(stored, entries)


def _number_problems(stored: Sequence[str], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Yield a message if the experts that one parameter is made of are not numbered from 0 without gaps.

    transformers stacks as many as there are, whatever their numbers.
    """
    leaves: dict[str, dict[int | None, str]] = {}
    for name in stored:
        linear = name.rpartition(".")[0]
        leaves.setdefault(linear.rpartition(".")[2], {})[expert_of(linear)] = name
    if all(number is None for names in leaves.values() for number in names):
        return
    for names in leaves.values():
        for number, name in names.items():
            if number not in range(len(names)):
                yield (
                    f"{entries[name].file}: {name}: expected the number of one of {len(names)} experts, "
                    f"0 to {len(names) - 1}, found another one"
                )
