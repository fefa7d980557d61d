"""Makes the folders `benchmarks`, `examples` and `scripts` of the repository importable as packages.

The repository's root must not be on `sys.path` here: its folder `kernels` would hide the package of that name by
Hugging Face, which transformers imports where it is installed.
"""

import importlib.util
import sys

from paths import ROOT


def import_package(name: str) -> None:
    """Import the package in the folder `name` of the repository; its modules are then found through it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


for package in ("benchmarks", "examples", "scripts"):
    import_package(package)
