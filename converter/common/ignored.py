"""Check the entries of `--ignore` against the modules of a model."""

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from bwla_kernels.errors import SourceError
from bwla_kernels.format.schema import is_ignored

PATTERN = "re:"
NEAR = 3
"""How many near matches an error shows."""


def check_ignored(ignore: Sequence[str], modules: Collection[str]) -> None:
    """Check that every entry of `--ignore` matches a module that would be quantized.

    Args:
        ignore: the entries, see `bwla_kernels.format.schema.is_ignored`.
        modules: full names of the linears, the head and the embedding.

    Raises:
        SourceError: an entry is not a regular expression although it begins with `re:`, or it matches nothing; the
            message shows near matches.
    """
    for entry in ignore:
        if entry.startswith(PATTERN):
            try:
                re.compile(entry.removeprefix(PATTERN))
            except re.error as cause:
                raise SourceError(
                    f"--ignore {entry}: expected a regular expression, found an error in it ({cause}): correct it, or "
                    "give the name of a module without re:"
                ) from None
        if not any(is_ignored(name, [entry]) for name in modules):
            near = near_matches(entry, modules)
            found = f"found none; near matches are {', '.join(near)}" if near else "found none"
            advice = (
                " (a pattern has to match from the start of the full name)"
                if entry.startswith(PATTERN)
                else ""
            )
            raise SourceError(
                f"--ignore {entry}: expected a module that would be quantized{advice}, {found}: correct the name, or "
                "leave this --ignore out"
            )


def near_matches(entry: str, modules: Collection[str]) -> list[str]:
    """Return the modules, or the parts of their names, that are spelled most like an entry of `--ignore`."""
    entry = entry.removeprefix(PATTERN).replace("\\", "").strip(".*^$ ")
    endings: dict[str, None] = {}
    for name in modules:
        parts = name.split(".")
        for start in range(len(parts)):
            for end in range(start + 1, len(parts) + 1):
                endings.setdefault(".".join(parts[start:end]))
    return get_close_matches(entry, endings, NEAR, cutoff=0.6)
