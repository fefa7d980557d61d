"""Keep computed values in files of the cache, so that they are computed once."""

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from bwla_converter.common.atomic_files import whole_file
from bwla_converter.common.write_errors import WriteError
from filelock import FileLock
from pydantic import TypeAdapter

Value = TypeVar("Value")


def kept_or_computed(file: Path, kind: type[Value], compute: Callable[[], Value]) -> Value:
    """Return the value that `file` holds; if there is no such file, compute it and write it.

    Of several processes that want the same value at the same time, one computes it and the others wait. A file that
    cannot be written or read is not an error: the value is computed again.

    Args:
        file: the file, named after everything that determines the value (`cached_file`).
        kind: the value's type, one that JSON can hold.
        compute: returns the value.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{file}.lock"))
        with suppress(OSError, ValueError):
            return TypeAdapter(kind).validate_json(file.read_bytes())
        value = compute()
        with suppress(OSError, WriteError), whole_file(file) as part:
            part.write_text(json.dumps(value))
        return value
