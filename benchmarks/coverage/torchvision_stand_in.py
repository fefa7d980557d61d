"""A stand-in for torchvision where it is not installed, as beside vLLM's CPU build, whose environment leaves it out.

vLLM's multimodal model classes import transformers' image processors, and these import torchvision. The coverage run
gives text to the models, so that nothing of torchvision is ever called.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME, VERSION = "torchvision", "0.28.0"
"""The version that belongs to the PyTorch of vLLM's CPU build."""


class _AnyAttribute(type):
    """The type of placeholders, which have every public attribute, for instance as an enumeration does."""

    def __getattr__(cls, name: str) -> Any:
        return _placeholder(name)


def _placeholder(name: str) -> Any:
    """Return a class that stands for anything with this name; special names are missing, as Python looks for them.

    Raises:
        AttributeError: the name is special.
    """
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyAttribute(name, (), {})


class _StandIn(MetaPathFinder, Loader):
    """Finds and loads torchvision and all its submodules as modules of placeholders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a specification if the module is torchvision's."""
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == NAME else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module."""
        vars(module).update({"__version__": VERSION, "__getattr__": _placeholder})


def install() -> None:
    """Let torchvision be imported as placeholders unless it is installed."""
    if importlib.util.find_spec(NAME) is None:
        sys.meta_path.append(_StandIn())
