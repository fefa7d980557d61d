"""Tensor names with the prefixes of wrappers, or without the model's own, and the names that they stand for.

torch.compile, distributed training and PEFT wrap modules, and a state dict that is saved through a wrapper carries its
name in front of, or inside, every tensor's name. A base model that is saved alone lacks the prefix of its own module.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from bwla_kernels.format.files import Entry, Scan

WRAPPERS = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "base_layer",
}
"""Names of wrapped modules, which may stand anywhere in a tensor's name."""

LEADING_WRAPPERS = ("base_model.model.", "module.")
"""Prefixes of wrappers whose names are too common to be removed elsewhere."""

ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_magnitude_vector", ".modules_to_save.")
"""Parts of the names of an adapter's tensors."""


@dataclass(frozen=True)
class RenamedScan:
    """The tensors of a folder under the names that the architecture gives them.

    Attributes:
        scan: the tensors; `Entry.key` holds the stored names.
        example: a stored name and what it is read as; None where nothing was renamed.
        loadable: whether transformers reads the stored names too.
    """

    scan: Scan
    example: tuple[str, str] | None = None
    loadable: bool = True

    @property
    def note(self) -> str | None:
        """A sentence for the user about the names; None where nothing was renamed."""
        if self.example is None:
            return None
        renamed = sum(bool(entry.key) for entry in self.scan.entries.values())
        return f"tensor names: {self.example[0]} is read as {self.example[1]}, and {renamed - 1} others alike"


def rename_tensors(scan: Scan, expected: Collection[str], base: str) -> RenamedScan:
    """Give the tensors of a folder the names that the architecture gives them, if there is no doubt about it.

    Args:
        scan: the tensors by their stored names.
        expected: names of all tensors of the architecture.
        base: name of the module that the head is not a part of, "model" in most architectures.

    Returns: the tensors as they are if they fit best that way, or if two of them would get the same name.
    """
    stored = [*scan.entries, *scan.lost]
    best, best_count = None, _count(stored, expected)
    if best_count == len(set(expected)):
        return RenamedScan(scan)
    for rename in _renamings(stored, expected, base):
        names = {name: rename(name) for name in stored}
        count = _count(names.values(), expected)
        if count > best_count and len(set(names.values())) == len(names):
            best, best_count = names, count
    if best is None:
        return RenamedScan(scan)
    entries = {
        best[name]: replace(entry, key=name if best[name] != name else "")
        for name, entry in scan.entries.items()
    }
    renamed = Scan(entries, scan.problems, frozenset(best[name] for name in scan.lost))
    example = next((name, new) for name, new in best.items() if name != new)
    loadable = all(new in (name, f"{base}.{name}") for name, new in best.items())
    return RenamedScan(renamed, example, loadable)


def _count(names: Collection[str], expected: Collection[str]) -> int:
    return len(set(names) & set(expected))


def _renamings(
    stored: Collection[str], expected: Collection[str], base: str
) -> Iterator[Callable[[str], str]]:
    """Yield functions from stored names to those that they may stand for, the simplest first."""
    modules = {name.rpartition(".")[0] for name in expected}

    def with_base(name: str) -> str:
        return name if name.rpartition(".")[0] in modules else f"{base}.{name}"

    plain = {without_wrappers(name) for name in stored}
    yield without_wrappers
    yield lambda name: with_base(without_wrappers(name))
    # A prefix of another origin, like that of the language model in a multimodal one.
    inner = [name.removeprefix(f"{base}.") for name in expected if ".0." in name][:1]
    for suffix in inner:
        for prefix in sorted({name.removesuffix(suffix) for name in plain if name.endswith(f".{suffix}")}):
            yield lambda name, prefix=prefix: with_base(without_wrappers(name).removeprefix(prefix))  # type: ignore[misc]
            outer = prefix.removesuffix(f"{base}.")
            yield lambda name, outer=outer: with_base(without_wrappers(name).removeprefix(outer))  # type: ignore[misc]


def without_wrappers(name: str) -> str:
    """Return a tensor's name without the names of wrappers."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while name.startswith(LEADING_WRAPPERS):
        for prefix in LEADING_WRAPPERS:
            name = name.removeprefix(prefix)
    return name


def names_problem(entries: Mapping[str, Entry], expected: Collection[str], architecture: str) -> str | None:
    """Describe in one line that a folder's tensors are those of another model; None if most are as expected.

    Args:
        entries: the tensors, renamed as far as possible.
        expected: names of all tensors of the architecture.
        architecture: its name.
    """
    adapter = next((name for name in entries if any(part in name for part in ADAPTER_PARTS)), None)
    if adapter is not None:
        return (
            f"expected the weights of a model, found those of an adapter beside them ({adapter}): merge them first, "
            "with PEFT's merge_and_unload() and save_pretrained(), and convert the result"
        )
    if not entries or 2 * _count(entries, expected) >= min(len(entries), len(set(expected))):
        return None
    wanted = next((name for name in expected if ".0." in name), next(iter(expected)))
    found = ", ".join(sorted(entries, key=lambda name: ("0" not in name.split("."), name))[:3])
    return (
        f"expected tensors named as in {architecture}, like {wanted}, found {len(entries)} tensors named like {found}: "
        "give the folder of a model that transformers has saved, or correct `architectures` in config.json"
    )
