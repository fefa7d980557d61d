"""Convert a Hugging Face checkpoint into a BWLA checkpoint.

    from bwla_converter import Options, convert

    summary = convert(Options(model="Qwen/Qwen3-8B", out=Path("qwen3-8b-bwla")))
    print(f"{summary.bits_per_weight:.3f} bits per weight")

`Calibration` selects the calibration text, and a `Listener` follows the progress. All errors that a caller can
do something about are `BWLAError`. To load the result with transformers, `import bwla_converter.hf` first.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bwla_converter.listener import Listener
    from bwla_converter.options import Calibration, LinearReport, Options, Summary
    from bwla_converter.pipeline import convert
    from bwla_kernels.errors import BWLAError

__all__ = ["BWLAError", "Calibration", "LinearReport", "Listener", "Options", "Summary", "convert"]

_MODULES = {
    "BWLAError": "bwla_kernels.errors",
    "Calibration": "bwla_converter.options",
    "LinearReport": "bwla_converter.options",
    "Listener": "bwla_converter.listener",
    "Options": "bwla_converter.options",
    "Summary": "bwla_converter.options",
    "convert": "bwla_converter.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: importing torch and transformers takes seconds."""
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
