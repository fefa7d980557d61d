"""Tuning: few candidates, each one that a launch accepts, compared with float64 and left out where it is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bwla_kernels.errors import BackendError
from bwla_kernels.triton import tune
from bwla_kernels.triton.layout import ChunkLayout, chunk_layout
from bwla_kernels.triton.prepare_config import PLANES_MAX_TOKENS
from bwla_kernels.triton.tuning import BINARY, INTEGER, MatmulConfig, load_table, shape_key
from torch import Tensor

SHAPES = [tune.parse_shape(text) for text in tune.SHAPES.split(",")]
PLANES = [(n, k, g, planes) for n, k, g, _ in SHAPES[:4] for planes in (2, 3, 4)]
HOPPER = ((9, 0), 132)
TINY = chunk_layout(120, 2, 96)
DTYPE = torch.float16
"""Of the outputs: the interpreter cuts bfloat16 off instead of rounding."""


def layout_of(shape: tuple[int, int, int, int]) -> ChunkLayout:
    n, k, g, planes = shape
    return chunk_layout(n, g, k // g, planes)


@pytest.mark.parametrize("shape", [*SHAPES, *PLANES, (1024, 1024, 1, 1), (300, 992, 31, 1)])
@pytest.mark.parametrize("m", [1, 2, 4, 5, 8, 16, 64, 256, 8192])
@pytest.mark.parametrize("gpu", [HOPPER, ((8, 0), 108), ((10, 0), 148)])
def test_candidates_fit_and_are_few(
    shape: tuple[int, int, int, int], m: int, gpu: tuple[tuple[int, int], int]
) -> None:
    layout = layout_of(shape)
    found = tune.candidates(layout, m, *gpu)
    assert found
    assert len(found) == len(set(found)) <= (32 if m in (5, 8, 64) else 16)
    varied = [config for first in found for config in tune.variations(first)]
    for config in (*found, *varied):
        assert layout.rows % config.block_n == 0
        assert m <= config.block_m or config.kernel == INTEGER
        if config.kernel == BINARY:
            # The input kernel writes bit planes for no more, and a table must not ask for them.
            assert m <= PLANES_MAX_TOKENS
            assert gpu[0] != (10, 0)
            assert config.block_n % (16 * (config.num_warps // config.k_warps)) == 0
        elif gpu[0] == (9, 0):
            assert config.block_m >= 16  # eight columns are no wgmma
    times = [tune.Finding(config, float(i)) for i, config in enumerate(found)]
    assert len(found) + len(tune.second_round(times)) <= (24 if m == 1 else 48)


def test_variations_are_tried_around_the_fastest_alone() -> None:
    first = tune.candidates(layout_of(SHAPES[0]), 1, *HOPPER)
    findings = [tune.Finding(config, error="wrong") for config in first]
    assert tune.second_round(findings) == []
    findings[3] = tune.Finding(first[3], 1.0)
    second = tune.second_round(findings)
    assert second
    assert not set(second) & set(first)
    assert {config.block_n for config in second} == {first[3].block_n}


def some_time(problem: tune.Problem, config: MatmulConfig) -> float:
    return 1.5


@pytest.mark.parametrize(
    "config",
    [MatmulConfig(BINARY, 2, 16, 2, k_warps=2, max_registers=255), MatmulConfig(INTEGER, 16, 64, 4, 3, 2)],
)
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_a_right_candidate_is_timed(config: MatmulConfig, planes: int, device: torch.device) -> None:
    problem = tune.draw(replace(TINY, planes=planes), 2, device, 1 << 16, DTYPE)
    assert len(problem.weights) > 1
    assert tune.try_config(problem, config, some_time) == tune.Finding(config, 1.5)


def test_a_wrong_candidate_is_recorded(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    problem = tune.draw(TINY, 1, device, 1, DTYPE)
    config = MatmulConfig(BINARY, 1, 16, 2, k_warps=2)
    right = torch.zeros(1, TINY.out_features, dtype=torch.float64, device=device)
    right[problem.tokens.unsqueeze(1), problem.rows] = problem.expected

    def answer(y: Tensor) -> tune.Finding:
        monkeypatch.setattr(tune, "binary_matmul", lambda *_: y)
        return tune.try_config(problem, config, some_time)

    assert answer(right).error is None
    assert answer(right.to(DTYPE)).error is None
    off = right.clone()
    off[0, 5] *= 1 + 4 * torch.finfo(DTYPE).eps
    assert "wrong by up to" in (answer(off).error or "")
    off[0, 5] = float("nan")
    assert "wrong by up to nan" in (answer(off).error or "")


def test_a_single_wrong_sign_shows(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    problem = tune.draw(chunk_layout(256, 1, 25600), 1, device, 1)
    q, scale = problem.prepared.q, problem.prepared.scale
    assert q is not None
    # What flipping the sign of one column does to every row, in bfloat16: exact / |change| is K's square root at most.
    change = 2 * q[0, 7].item() * scale[0, 0] * problem.weights[0].scale
    y = torch.zeros(1, 256, dtype=torch.float64, device=device)
    y[problem.tokens.unsqueeze(1), problem.rows] = problem.expected
    monkeypatch.setattr(tune, "binary_matmul", lambda *_: (y + change).bfloat16())
    finding = tune.try_config(problem, MatmulConfig(BINARY, 1, 16, 2, k_warps=2), some_time)
    assert "wrong by" in (finding.error or "")


def test_a_failing_candidate_is_recorded(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    problem, config = tune.draw(TINY, 1, device, 1, DTYPE), MatmulConfig(BINARY, 1, 16, 2, k_warps=2)

    def fail(*_: object) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tune, "binary_matmul", fail)
    finding = tune.try_config(problem, config, some_time)
    assert finding.error == "RuntimeError: out of resource: shared memory"
    assert (
        tune.fastest([finding, tune.Finding(config, 2.0), tune.Finding(config, 1.0)])[0].microseconds == 1.0
    )


def test_a_record_is_read_back(tmp_path: Path) -> None:
    log = tmp_path / "table.jsonl"
    findings = [
        tune.Finding(MatmulConfig(BINARY, 1, 16, 2, k_warps=2, unroll=2), 3.5),
        tune.Finding(MatmulConfig(INTEGER, 16, 64, 4, 3, 2), error="wrong by 0.1"),
    ]
    lines = [json.dumps({"shape": "16x32/1", "m": 1, **finding.row()}) for finding in findings]
    log.write_text("\n".join([*lines, lines[0][:40]]))
    assert tune.read_findings(log) == {("16x32/1", 1): findings}
    assert tune.read_findings(tmp_path / "none.jsonl") == {}


def test_a_measured_shape_enters_a_copy_of_the_table() -> None:
    table = tune.new_table("a GPU", "90")
    config = MatmulConfig(INTEGER, 16, 64, 4, 3, 2)
    tune.enter(table, "90", (16, 32, 1, 1), 9, config)
    tune.enter(table, "90", (16, 32, 1, 2), 9, replace(config, block_n=32))
    assert MatmulConfig(**table["architectures"]["90"]["shapes"][shape_key(16, 32, 1)]["16"]) == config
    assert table["architectures"]["90"]["shapes"]["16x32/1/2"]["16"]["block_n"] == 32
    assert shape_key(16, 32, 1) not in load_table()["architectures"]["90"]["shapes"]
    assert "a GPU" in table["origin"]


def test_a_shape_is_written_so() -> None:
    assert tune.parse_shape("51200x5120/1") == (51200, 5120, 1, 1)
    assert tune.parse_shape(shape_key(51200, 5120, 1, 3)) == (51200, 5120, 1, 3)
    for text in ("51200x5120", "a", "1x2/3/4/5"):
        with pytest.raises(BackendError, match="expected a shape NxK/G"):
            tune.parse_shape(text)
