"""Load the compiled CPU kernel (binary_linear.cpp): declare its functions, set its threads, choose the variant."""

import ctypes
import enum
import functools
import os
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from bwla_kernels.cpu import build
from bwla_kernels.errors import BackendError

ISA_VARIABLE = "BWLA_CPU_ISA"
"""Environment variable that forces a variant; read once, when the library is loaded."""


class Isa(enum.IntEnum):
    """The variants, numbered as in the library."""

    SCALAR = 0
    AVX2 = 1
    AVX512BW = 2
    AVX512VBMI = 3
    AMX = 4


class LayerStruct(ctypes.Structure):
    """`bwla_layer`: the sizes of a layer; `blocks` is the number of rotation groups."""

    _fields_ = (
        ("isa", c_int32),
        ("bits", c_int32),
        ("n", c_int64),
        ("blocks", c_int64),
        ("n1", c_int64),
        ("n2", c_int64),
        ("rank", c_int64),
        ("planes", c_int64),
        ("clip", c_double),
        ("grouped", c_int64),
    )


@dataclass(frozen=True)
class CpuLibrary:
    """The loaded library.

    Attributes:
        handle: the shared library with typed functions.
        isa: the variant in use: the fastest that the processor runs, or what BWLA_CPU_ISA says.
        threading: description of the threads that a call runs on.
    """

    handle: ctypes.CDLL
    isa: Isa
    threading: str


_LAYER = [c_void_p, c_void_p]  # bwla_layer, packed
_X = [c_void_p, c_int64, c_int64, c_int32]  # data, rows, row stride, dtype
_ROUTING = [c_void_p, c_void_p, c_int32, c_int64]  # weights, ids, bytes of an id, top-k
_SIGNATURES: dict[str, tuple[object, list[type]]] = {
    "bwla_build_id": (c_char_p, []),
    "bwla_best_isa": (c_int32, []),
    "bwla_isa_supported": (c_int32, [c_int32]),
    "bwla_no_amx": (c_char_p, []),
    "bwla_set_openmp": (None, [c_void_p] * 4),
    "bwla_advise_huge_pages": (None, [c_void_p, c_int64]),
    "bwla_packed_bytes": (c_int64, [c_void_p]),
    "bwla_pack": (c_int32, [*[c_void_p] * 9, c_int32]),
    "bwla_unpack": (c_int32, [*_LAYER, c_int64, c_int64, c_void_p, c_int32]),
    "bwla_linear": (c_int32, [*_LAYER, *_X, c_void_p, c_int32, c_void_p, c_int32]),
    "bwla_prepare_input": (c_int32, [*_LAYER, *_X, *[c_void_p] * 3, c_int32]),
    "bwla_binary_matmul": (c_int32, [*_LAYER, *[c_void_p] * 3, c_int64, c_void_p, c_int32, c_int32]),
    "bwla_dot_products": (c_int32, [*_LAYER, c_void_p, c_int64, c_void_p, c_int32]),
    "bwla_experts_bytes": (c_int64, [c_void_p, c_int64]),
    "bwla_pack_experts": (c_int32, [c_void_p, c_int64, *[c_void_p] * 8, c_int32]),
    "bwla_experts": (
        c_int32,
        [
            c_void_p,
            c_void_p,
            c_int64,
            c_int32,
            c_double,
            c_double,
            *[c_void_p] * 4,
            *_X,
            *_ROUTING,
            c_void_p,
            c_int32,
        ],
    ),
    "bwla_register_ops": (c_char_p, [c_void_p, c_int32]),
    "bwla_sign_step": (c_int32, [c_int32, *[c_void_p] * 9, *[c_int64] * 4, c_int32]),
    "bwla_head": (c_int32, [c_int32, *[c_void_p] * 3, c_int64, c_int64, *_X, c_void_p, c_int32]),
}


def share_openmp(handle: ctypes.CDLL, torch_cpu: ctypes.CDLL) -> str:
    """Give the library the OpenMP runtime that torch is linked to; return a description of the threads.

    The entry points are looked up through libtorch_cpu and its dependencies, so they belong to the copy that torch
    uses, whatever its file name. A second runtime in the process would have a second pool of spinning threads.
    """
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    try:
        handle.bwla_set_openmp(*(ctypes.cast(getattr(torch_cpu, name), c_void_p) for name in names))
    except AttributeError as error:
        return f"one thread, since torch's OpenMP runtime was not found ({error})"
    return "torch's OpenMP threads"


def choose_isa(handle: ctypes.CDLL, requested: str | None) -> Isa:
    """Choose the variant: the fastest, or the one called `requested`.

    Raises:
        BackendError: there is no such variant, or this processor cannot run it.
    """
    best = Isa(handle.bwla_best_isa())
    if not requested:
        return best
    if requested.upper() not in Isa.__members__:
        names = ", ".join(isa.name.lower() for isa in Isa)
        raise BackendError(
            f"{ISA_VARIABLE}: expected one of {names}, found {requested!r}: correct or unset it"
        )
    isa = Isa[requested.upper()]
    if not handle.bwla_isa_supported(isa):
        reason = f" ({handle.bwla_no_amx().decode()})" if isa is Isa.AMX else ""
        raise BackendError(
            f"{ISA_VARIABLE}: expected a variant that this processor runs (the best is {best.name.lower()}), "
            f"found {requested!r}{reason}: unset it"
        )
    return isa


def open_library(folder: Path) -> ctypes.CDLL:
    """Open the shared library in `folder` and declare its functions.

    Raises:
        BackendError: it is missing (the message quotes why it was not built), cannot be loaded, or was built from
            other sources than those beside it.
    """
    path, failure = folder / build.LIBRARY, folder / build.FAILURE
    advice = f"run `python {folder / 'build.py'}` or install bwla again"
    if not path.exists():
        reason = failure.read_text().strip() if failure.exists() else "it was not compiled"
        raise BackendError(f"the CPU kernel {path} is missing: {reason}; {advice}")
    try:
        handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BackendError(f"the CPU kernel {path} cannot be loaded: {error}; {advice}") from error
    built_from = handle.bwla_build_id().decode()
    if (folder / build.SOURCE).exists() and built_from != build.build_id(folder):
        raise BackendError(
            f"the CPU kernel {path} was built from other sources than those beside it; {advice}"
        )
    return handle


def open_torch() -> ctypes.CDLL:
    """Open the libtorch_cpu of this process.

    Raises:
        BackendError: it cannot be loaded.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(
            f"the CPU kernel needs torch's own library: {error}; install torch again"
        ) from error


@functools.cache
def load() -> CpuLibrary:
    """Load the library once and register its torch ops.

    Raises:
        BackendError: it cannot be used; the message says why and what to do.
    """
    torch_cpu = open_torch()
    handle = open_library(Path(__file__).parent)
    isa = choose_isa(handle, os.environ.get(ISA_VARIABLE))
    threading = share_openmp(handle, torch_cpu)
    missing = handle.bwla_register_ops(torch_cpu._handle, isa)
    if missing:
        raise BackendError(
            f"the CPU kernel did not find {missing.decode()} in torch {torch.__version__}: "
            "install a torch from 2.11 on that bwla was tested with"
        )
    return CpuLibrary(handle, isa, threading)


def available() -> tuple[bool, str]:
    """Return whether the CPU kernel can be used, and the reason."""
    try:
        library = load()
    except BackendError as error:
        return False, str(error)
    description = f"variant {library.isa.name.lower()} on {library.threading}"
    if library.isa is Isa.AVX512VBMI and (reason := library.handle.bwla_no_amx().decode()):
        description += f" (not amx: {reason})"
    return True, description
