"""Lists of everything that is wrong with a model, in one error."""

from pathlib import Path

from bwla_kernels.errors import SourceError

MAX_LISTED = 5


def raise_if_any(path: Path, problems: list[str]) -> None:
    """Raise `SourceError` with a list of `problems` of the model at `path`, unless there are none."""
    if not problems:
        return
    shown = problems[:MAX_LISTED]
    more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    lines = "".join(f"\n  {problem}" for problem in shown)
    raise SourceError(f"{path}: cannot be converted, found {len(problems)} problem(s):{lines}{more}")
