"""Run the Triton kernels in the interpreter if there is no GPU.

A kernel is interpreted or compiled depending on TRITON_INTERPRET when its decorator runs. Each conftest.py whose test
modules import kernels imports this module, which sets the variable, and its `pytest_collection_finish`, which unsets it
after the collection: servers that other tests start must not inherit it.
"""

import os
import sys
from functools import partialmethod

import torch

INTERPRETED = not torch.cuda.is_available()
VARIABLE = "TRITON_INTERPRET"


def _interpret_library() -> None:
    """Replace Triton's own helpers (`tl.sum`, `tl.zeros`, ...) by interpreted ones.

    If Triton was imported before, as transformers does, they are compiled functions, which the interpreter cannot call.
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
    """Unset the variable."""
    if INTERPRETED:
        os.environ.pop(VARIABLE, None)
