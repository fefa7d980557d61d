"""The list of stored tensors in `quantization_config`: written by the converter, compared with the headers by loaders.

An entry is a name and what is stored under it: `"model.layers.[0-63].input_layernorm.weight": "bfloat16 [5120]"`. Parts
of a name that are numbers may stand for several: `[0-2,5]` for 0, 1, 2 and 5, in all combinations if there are several.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

from bwla_kernels.format.files import DTYPES, Entry
from bwla_kernels.format.head import INT8_SUFFIX
from bwla_kernels.format.layer import LayerSpec, TensorSpec, shape_problem, tensor_specs

PACKED_SUFFIX = ".weight_packed"
"""End of the name of a quantized linear's signs."""

NOT_LISTED = (
    "written by an older version of BWLA, which did not list its tensors: the sizes of those that are not quantized "
    "are checked while loading"
)
"""What loaders say of a checkpoint without a list."""

TIED = "= "
"""What stands before the name of the tensor to which another one is tied; it may be stored beside it, or not."""

_NUMBER = re.compile(r"0|[1-9]\d{0,8}")
_NUMBERS = re.compile(r"\[(\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*)\]")
_STORED = re.compile(r"(\w+) \[((?:\d{1,15}(?:, \d{1,15})*)?)\]")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
_DERIVED = tensor_specs(LayerSpec(1, 32, 1, 1, 32, rank=1)).keys() - {"weight_packed"}
"""Tensors of a quantized linear whose shapes follow from its signs and its settings."""


def listed_names(names: Iterable[str]) -> list[str]:
    """Return the stored tensors that are listed: all those whose shape does not follow from another one's."""
    names = list(names)
    stored = set(names)

    def is_derived(name: str) -> bool:
        module, _, key = name.rpartition(".")
        in_one_bit = key in _DERIVED and f"{module}{PACKED_SUFFIX}" in stored
        return in_one_bit or (key == "weight_scale" and f"{module}{INT8_SUFFIX}" in stored)

    return [name for name in names if not is_derived(name)]


def describe_tensors(entries: Mapping[str, Entry], tied: Mapping[str, str]) -> dict[str, str]:
    """Return the list of a checkpoint's tensors.

    Args:
        entries: all stored tensors.
        tied: name of a tensor -> name of the one that has the same values, to which config.json ties it.
    """
    groups: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for name in listed_names(entries):
        template, numbers = _split(name)
        is_tied = tied.get(name) in entries
        text = f"{TIED}{tied[name]}" if is_tied else _describe(entries[name])
        groups.setdefault((template, text), set()).add(numbers)
    return {
        _pattern(template, numbers): text
        for (template, text), indices in sorted(groups.items())
        for numbers in _combinations(sorted(indices))
    }


def parse_tensors(tensors: Mapping[str, str]) -> list["ListedTensors"]:
    """Return the entries of a list of tensors.

    Raises:
        ValueError: a name or a description is not valid.
    """
    return [ListedTensors.parse(pattern, text) for pattern, text in tensors.items()]


def tied_tensors(tensors: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return name -> name of the tensor to which it is tied, of those of `names` that are listed as tied."""
    tied = [(ListedTensors.parse(pattern, text), text) for pattern, text in tensors.items() if TIED in text]
    return {name: text.removeprefix(TIED) for item, text in tied for name in names if item.covers(name)}


def listed_problems(tensors: Mapping[str, str], entries: Mapping[str, Entry], folder: Path) -> Iterator[str]:
    """Yield the differences between a list of tensors and the stored ones.

    Args:
        tensors: a valid list.
        entries: all stored tensors.
        folder: where they are, for messages.
    """
    by_template: dict[str, list[ListedTensors]] = {}
    listed = parse_tensors(tensors)
    for item in listed:
        by_template.setdefault(item.template, []).append(item)
    found: dict[str, int] = dict.fromkeys(tensors, 0)
    unknown = []
    for name in listed_names(entries):
        template, numbers = _split(name)
        fitting = [item for item in by_template.get(template, ()) if item.covers_numbers(numbers)]
        for item in fitting:
            found[item.pattern] += 1
            problem = item.spec and shape_problem(item.spec, entries[name].shape, entries[name].dtype)
            if problem:
                yield f"{folder / entries[name].file}: {name}: {problem} (config.json: quantization_config.tensors)"
        if not fitting:
            unknown.append(name)
    for item in listed:
        if item.spec is not None and found[item.pattern] < item.count:
            name = next(name for name in item.names() if name not in entries)
            yield f"{folder}: {name} is missing, expected shape {list(item.spec.shape)}"
    for name in sorted(unknown):
        yield (
            f"{folder / entries[name].file}: {name} is not a tensor of this model: expected only those that "
            "config.json lists (quantization_config.tensors)"
        )


@dataclass(frozen=True)
class ListedTensors:
    """An entry of a list of tensors: all those that differ only in numbers.

    Attributes:
        pattern: the entry's name.
        template: the name with `*` for each number.
        numbers: for each `*`, the numbers that it stands for, as ascending ranges.
        spec: shape and dtype; None for a tensor that is tied to another one.
    """

    pattern: str
    template: str
    numbers: tuple[tuple[range, ...], ...]
    spec: TensorSpec | None

    @classmethod
    def parse(cls, pattern: str, text: str) -> "ListedTensors":
        """Parse an entry.

        Raises:
            ValueError: it is not valid.
        """
        parts, numbers = [], []
        for part in pattern.split("."):
            if part == "*":
                raise ValueError(f"{pattern}: expected numbers, such as [0-2,5]")
            several = _NUMBERS.fullmatch(part)
            is_number = several or _NUMBER.fullmatch(part)
            parts.append("*" if is_number else part)
            if is_number:
                numbers.append(tuple(_ranges(several[1] if several else part)))
        stored = _STORED.fullmatch(text)
        if stored is None or stored[1] not in _DTYPES:
            if text.startswith(TIED):
                return cls(pattern, ".".join(parts), tuple(numbers), None)
            raise ValueError(f"{pattern}: expected a dtype and a shape, such as 'bfloat16 [64]'")
        shape = tuple(int(size) for size in stored[2].split(", ") if size)
        return cls(pattern, ".".join(parts), tuple(numbers), TensorSpec(shape, (_DTYPES[stored[1]],)))

    @property
    def count(self) -> int:
        """Number of tensors."""
        return prod(sum(part.stop - part.start for part in ranges) for ranges in self.numbers)

    def covers(self, name: str) -> bool:
        """Return whether the tensor called `name` is one of them."""
        template, numbers = _split(name)
        return template == self.template and self.covers_numbers(numbers)

    def covers_numbers(self, numbers: Sequence[int]) -> bool:
        """Return whether the tensor with these numbers in the name, and the same template, is one of them."""
        pairs = zip(numbers, self.numbers, strict=True)
        return all(any(number in part for part in ranges) for number, ranges in pairs)

    def names(self) -> Iterator[str]:
        """Yield their names, one at a time, because a damaged entry may stand for any number of them."""
        for numbers in _product(self.numbers):
            rest = iter(numbers)
            yield ".".join(str(next(rest)) if part == "*" else part for part in self.template.split("."))


def runs_of(numbers: Iterable[int]) -> list[list[int]]:
    """Divide ascending numbers into runs of consecutive ones."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _describe(entry: Entry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """Return a name with `*` for each part that is a number, and the numbers."""
    parts, numbers = name.split("."), []
    for index, part in enumerate(parts):
        if _NUMBER.fullmatch(part):
            numbers.append(int(part))
            parts[index] = "*"
    return ".".join(parts), tuple(numbers)


def _pattern(template: str, numbers: Sequence[Sequence[int]]) -> str:
    rest = iter(numbers)
    return ".".join(_join(next(rest)) if part == "*" else part for part in template.split("."))


def _join(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text: `7`, or `[0-2,5]`."""
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs_of(numbers)]
    return texts[0] if len(numbers) == 1 else f"[{','.join(texts)}]"


def _ranges(text: str) -> Iterator[range]:
    """Yield the ranges of `0-2,5`. Raises ValueError unless they ascend."""
    last = -1
    for part in text.split(","):
        first, _, end = part.partition("-")
        numbers = range(int(first), int(end or first) + 1)
        if not last < numbers.start < numbers.stop:
            raise ValueError(f"[{text}]: expected ascending numbers")
        last = numbers.stop - 1
        yield numbers


def _combinations(indices: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Divide ascending tuples of one length into as few sets of all combinations as their order gives."""
    if not indices[0]:
        return [()]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in indices:
        rests.setdefault(first, []).append(tuple(rest))
    firsts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, others in rests.items():
        firsts.setdefault(tuple(others), []).append(first)
    return [(tuple(numbers), *rest) for others, numbers in firsts.items() for rest in _combinations(others)]


def _product(numbers: Sequence[Sequence[range]]) -> Iterator[tuple[int, ...]]:
    """Yield all combinations; unlike itertools.product, without making lists of the ranges."""
    if not numbers:
        yield ()
        return
    for first in chain.from_iterable(numbers[0]):
        for rest in _product(numbers[1:]):
            yield first, *rest
