"""Sees to it that the Triton kernels are interpreted where there is no GPU, whoever imports them first.

A kernel is interpreted or compiled according to TRITON_INTERPRET at the moment its decorator runs. Every conftest.py
whose test modules import kernels imports this module, which sets the variable, and its `pytest_collection_finish`,
which takes it back after the collection: the servers that other tests start must not inherit it.
"""

import os
import sys
from functools import partialmethod

import torch

INTERPRETED = not torch.cuda.is_available()
VARIABLE = "TRITON_INTERPRET"


def _interpret_library() -> None:
    """Turn Triton's own helpers (`tl.sum`, `tl.zeros`, ...) into interpreted ones.

    Another test may have imported Triton before (transformers does); then they were decorated for the compiler,
    and the interpreter cannot call them.
    """
    import triton.language as tl
    from triton import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    library = [module for name, module in sys.modules.items() if name.startswith("triton.language")]
    for owner in (tl, *library):
        for name, value in list(vars(owner).items()):
            if isinstance(value, JITFunction):
                setattr(owner, name, InterpretedFunction(value.fn))
    for name, value in list(vars(tl.tensor).items()):
        if isinstance(value, JITFunction):
            setattr(tl.tensor, name, partialmethod(InterpretedFunction(value.fn)))


if INTERPRETED:
    os.environ[VARIABLE] = "1"
try:
    import triton  # noqa: F401
except ImportError:
    MISSING = True
else:
    MISSING = False
    if INTERPRETED:
        _interpret_library()


def pytest_collection_finish() -> None:
    """Let nothing outside these tests see the variable."""
    if INTERPRETED:
        os.environ.pop(VARIABLE, None)
