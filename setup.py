"""Compiles the CPU kernel during `pip install` and `python -m build`; everything else is in pyproject.toml.

Without a working C++ compiler the installation goes on without the kernel: the reason is printed and left beside
where the library would be, and the loader quotes it.
"""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNEL = ROOT / "kernels" / "cpu"
NAME = "bwla_kernels.cpu._binary_linear"


def load_builder() -> ModuleType:
    """kernels/cpu/build.py, by path: the package itself imports torch, which a build environment lacks."""
    spec = importlib.util.spec_from_file_location("bwla_build", KERNEL / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()


class BuildKernel(build_ext):
    """Builds the one plain shared library with our own command; it is no Python extension module."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_name(builder.LIBRARY))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        failure = target.with_name(builder.FAILURE)
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in (target, failure):
            stale.unlink(missing_ok=True)
        try:
            builder.compile_library(target, KERNEL)
        except builder.BuildError as error:
            failure.write_text(f"{error}\n")
            print(f"warning: bwla is installed without its CPU kernel: {error}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the library, or the reason why there is none, goes beside the sources."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for name in (builder.LIBRARY, builder.FAILURE):
                (KERNEL / name).unlink(missing_ok=True)
                if built.with_name(name).exists():
                    shutil.copy2(built.with_name(name), KERNEL / name)


class PlatformWheel(bdist_wheel):
    """The library depends on the platform, but on no version of Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


source, *headers = builder.sources(KERNEL)
setup(
    ext_modules=[
        Extension(NAME, [relative(source)], depends=[relative(header) for header in headers], optional=True)
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": PlatformWheel},
)
