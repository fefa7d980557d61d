"""Finding, building and loading the library: one OpenMP runtime, the forced variant, and what goes wrong in words."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bwla_kernels.cpu import build, library
from bwla_kernels.cpu.library import ISA_VARIABLE, CpuLibrary, Isa, available, choose_isa, load, open_library
from bwla_kernels.errors import BackendError

ONE_CALL = """
import torch
from bwla_kernels.cpu import linear as kernel
from bwla_kernels.cpu.library import load
from bwla_kernels.format import LayerSpec, to_storage_dtype
spec = LayerSpec(64, 64, 1, 8, 8)
layer = {
    "weight_packed": torch.zeros(64, 2, dtype=torch.int32),
    "weight_scale": torch.ones(64),
    "rotation_left": torch.eye(8).unsqueeze(0),
    "rotation_right": torch.eye(8).unsqueeze(0),
    "column_scale": torch.ones(64),
}
torch.ones(1 << 20).sum()
y = kernel.linear(torch.ones(3, 64), kernel.pack(to_storage_dtype(layer, spec), spec), spec, threads=-2)
assert (y == -64).all(), y
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_process_has_one_openmp_runtime() -> None:
    maps = """
names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
found = sorted(name for name in names if any(part in name.rsplit("/", 1)[-1] for part in ("gomp", "omp5", "libomp")))
print(load().threading, found, sep="|")
"""
    done = run(ONE_CALL + maps)
    assert done.returncode == 0, done.stderr
    threading, found = done.stdout.strip().split("|")
    assert threading == "torch's OpenMP threads"
    assert found.count(",") == 0, found
    assert "omp" in found


def test_the_environment_forces_a_variant(isa: Isa) -> None:
    done = run(ONE_CALL + "print(load().isa.name)", **{ISA_VARIABLE: isa.name.lower()})
    assert done.stdout.strip() == isa.name, done.stderr


def test_an_unknown_variant_is_refused() -> None:
    done = run("from bwla_kernels.cpu.library import available; print(available())", **{ISA_VARIABLE: "neon"})
    assert "expected one of scalar, avx2, avx512bw, avx512vbmi, amx, found 'neon'" in done.stdout, done.stderr


def test_a_variant_that_the_processor_lacks_is_refused() -> None:
    old = SimpleNamespace(bwla_best_isa=lambda: Isa.AVX2, bwla_isa_supported=lambda isa: isa <= Isa.AVX2)
    assert choose_isa(old, None) == Isa.AVX2
    assert choose_isa(old, "scalar") == Isa.SCALAR
    with pytest.raises(BackendError, match=r"the best is avx2\), found 'avx512vbmi': unset it"):
        choose_isa(old, "avx512vbmi")


def test_a_processor_whose_system_refuses_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = SimpleNamespace(
        bwla_best_isa=lambda: Isa.AVX512VBMI,
        bwla_isa_supported=lambda isa: isa <= Isa.AVX512VBMI,
        bwla_no_amx=lambda: b"the system refused",
    )
    assert choose_isa(refused, None) == Isa.AVX512VBMI
    with pytest.raises(BackendError, match=r"avx512vbmi\), found 'amx' \(the system refused\): unset it"):
        choose_isa(refused, "amx")
    monkeypatch.setattr(library, "load", lambda: CpuLibrary(refused, Isa.AVX512VBMI, "one thread"))
    assert available() == (True, "variant avx512vbmi on one thread (not amx: the system refused)")


REFUSE_ARCH_PRCTL = """
import ctypes, struct
allow, refuse = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO with EPERM
program = [(0x20, 0, 0, 0), (0x15, 0, 1, 158), (0x06, 0, 0, refuse), (0x06, 0, 0, allow)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
prctl = ctypes.CDLL(None).prctl
assert prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, header, 0, 0) == 0
"""
"""Have the system refuse arch_prctl, as a sandbox may: a seccomp filter on system call 158 of x86-64."""


def test_a_system_that_refuses_the_registers_of_amx() -> None:
    if not load().handle.bwla_isa_supported(Isa.AMX):
        pytest.skip("this processor, system or compiler has no AMX")
    done = run(
        REFUSE_ARCH_PRCTL + ONE_CALL + "from bwla_kernels.cpu.library import available; print(available())"
    )
    assert done.returncode == 0, done.stderr
    assert "variant avx512vbmi" in done.stdout
    assert "not amx: the system refused its registers: arch_prctl, error 1" in done.stdout


def test_a_missing_library_says_why(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="is missing: it was not compiled; run"):
        open_library(tmp_path)
    (tmp_path / build.FAILURE).write_text("no C++ compiler found\n")
    with pytest.raises(BackendError, match="is missing: no C.. compiler found; run"):
        open_library(tmp_path)
    (tmp_path / build.LIBRARY).write_bytes(b"not a library")
    with pytest.raises(BackendError, match="cannot be loaded: .* run"):
        open_library(tmp_path)


def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    shutil.copy2(build.FOLDER / build.LIBRARY, tmp_path)
    for source in build.sources():
        shutil.copy2(source, tmp_path)
    assert open_library(tmp_path).bwla_build_id() == load().handle.bwla_build_id()
    with (tmp_path / "plan.h").open("a") as changed:
        changed.write("// changed\n")
    with pytest.raises(BackendError, match="was built from other sources than those beside it; run"):
        open_library(tmp_path)


def test_building_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++ -m64")
    with pytest.raises(build.BuildError, match=r"looked for /nowhere/c\+\+ -m64"):
        build.compile_library(tmp_path / "library.so")


def test_a_failed_build_quotes_the_compiler_and_keeps_the_old_library(tmp_path: Path) -> None:
    (tmp_path / build.SOURCE).write_text("int broken( {\n")
    target = tmp_path / build.LIBRARY
    target.write_text("old")
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    with pytest.raises(build.BuildError, match="failed with status 1 with the output: .*error"):
        build.compile_library(target, tmp_path)
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [build.SOURCE, build.LIBRARY][::-1]
