"""Tells transformers of BWLA when transformers is imported, and not before: its import takes seconds.

transformers has a public registry for quantizers but no entry point that it looks through by itself, so something of
ours has to run once the registry is there. Nothing of transformers is changed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTRY = "transformers.quantizers.auto"
OURS = "bwla_converter.hf.quantizer"


def register_with_transformers() -> None:
    """Register the quantizer now, where transformers' registry is imported already, or else as soon as it is."""
    if REGISTRY in sys.modules:
        importlib.import_module(OURS)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder(MetaPathFinder):
    """Waits for the import of the registry; finds nothing itself, and leaves when its time has come."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Loads the registry as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module(OURS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
