"""The configurations of the coverage run, for tests that observe structure; no weights are built."""

from pathlib import Path
from typing import Any

from benchmarks.coverage.build import make_config
from benchmarks.coverage.cases import CASES


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """Write the config.json of a case to `folder`, and nothing else; return the folder."""
    make_config(CASES[name], **changes).save_pretrained(folder)
    return folder
