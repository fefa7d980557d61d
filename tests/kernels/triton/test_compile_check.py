"""Every kernel compiles cleanly without a GPU, and the gates that say so fail on kernels that do not.

In a process of its own: this one may hold the kernels as interpreted ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOUND_AND_BAD = """
from dataclasses import replace

import triton
import triton.language as tl
from bwla_kernels.triton.compiling import CompileCase


@triton.jit
def product(a, b, out, K, M: tl.constexpr, STEP: tl.constexpr):
    i, k = tl.arange(0, M), tl.arange(0, STEP)
    total = tl.zeros([M, M], tl.int32)
    for at in range(0, K, STEP):
        left = tl.load(a + i[:, None] * K + at + k[None, :])
        right = tl.load(b + i[None, :] * K + at + k[:, None])
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    tl.store(out + i[:, None] * M + i[None, :], total)


@triton.jit
def double(x, out, M: tl.constexpr):
    i = tl.arange(0, M)
    tl.store(out + i, tl.load(x + i) * 2)


def product_case(what, size, step, stages, **options):
    return CompileCase(
        "product", what, product,
        {"a": "*i8", "b": "*i8", "out": "*i32", "K": "i32", "M": "constexpr", "STEP": "constexpr"},
        {"M": size, "STEP": step}, ("a", "b", "out", "K"), 4, stages, ("IMMA", "IGMMA"),
        options=options,
    )


def compile_cases(arch):
    return [
        product_case("sound", 64, 64, 3),
        product_case("too few registers", 128, 64, 2, maxnreg=48),
        product_case("too many stages", 128, 256, 6),
        replace(product_case("lost fragments", 64, 64, 3), fragment_layout="#wanted"),
        CompileCase(
            "double", "no dot", double, {"x": "*i32", "out": "*i32", "M": "constexpr"}, {"M": 128},
            ("x", "out"), 4, 1, ("IMMA",),
        ),
    ]
"""


def run_check(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "bwla_kernels.triton.compile_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "count"), [(80, 1), (89, 1), (90, 2), (100, 1)])
def test_kernels_compile_cleanly(arch: int, count: int, tmp_path: Path) -> None:
    """A sample of each kernel's configurations, with the installed Triton; the module itself compiles them all."""
    done = run_check(
        "--arch", str(arch), "--sample", str(count), "--out", str(tmp_path / "table.json"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    kernels = {row["kernel"] for row in rows}
    assert "integer_mma_kernel" in kernels
    assert ("binary_mma_kernel" in kernels) == (arch < 100)
    # The bit planes of activations, which prepare_few writes, are others.
    products = {name for name in kernels if name.endswith("_mma_kernel")}
    assert products == {
        row["kernel"] for row in rows if row["kernel"] in products and "planes" in row["config"]
    }
    for row in rows:
        assert row["arch"] == arch
        assert row["registers"] > 16
        assert row["spills"] == 0
        if "mma" in row["kernel"]:
            assert row["tensor_core"]
            assert 0 < row["instructions_per_weight"] < 10


def test_gates_fail_on_bad_kernels(tmp_path: Path) -> None:
    """Each gate names kernel, configuration, architecture, what was found and the limit."""
    (tmp_path / "bad_cases.py").write_text(SOUND_AND_BAD)
    done = run_check("--cases", "bad_cases", "--arch", "80", cwd=tmp_path)
    assert done.returncode == 1
    problems = [line for line in done.stderr.splitlines() if line.startswith("FAILED")]
    assert not any("[sound]" in problem for problem in problems)
    for expected in (
        "product [too few registers] on sm_80: ",
        "spill instructions (LDL/STL), the limit is 0",
        "bytes of stack, the limit is 0",
        "product [too many stages] on sm_80: ",
        "bytes of shared memory, the limit is 166912",
        "product [lost fragments] on sm_80: inline mma on layout none, it relies on #wanted",
        "double [no dot] on sm_80: no tensor-core instruction (IMMA) found",
    ):
        assert any(expected in problem for problem in problems), f"{expected!r} not in {problems}"

    sound = ("--cases", "bad_cases", "--arch", "80", "--config", "sound", "--out", "table.json")
    done = run_check(*sound, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.json").read_text()
    done = run_check(*sound, "--missing", cwd=tmp_path)
    assert "0 compiled, 0 problems" in done.stdout, "what the table has is not compiled again"
    assert json.loads((tmp_path / "table.json").read_text())["rows"] == json.loads(table)["rows"]
    (tmp_path / "table.json").write_text(table.replace('"triton": "', '"triton": "0.'))
    done = run_check(*sound, "--missing", cwd=tmp_path)
    assert done.returncode == 2, "a table holds what one Triton compiled"
    assert "found one made with 0." in done.stderr


def test_interpreted_kernels_are_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "bwla_kernels.triton.compile_check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
