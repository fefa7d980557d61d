"""The summary of samples, and the shapes and order of what is measured."""

import torch

from benchmarks.kernels.gpu import layer_table
from benchmarks.kernels.gpu.journal import Row
from benchmarks.kernels.gpu.shapes import CPU, GPU, MODELS, with_planes
from benchmarks.kernels.gpu.smoke import smoke_cases
from benchmarks.kernels.gpu.timing import Timing, time_calls, timing_of


def test_samples_are_summarized() -> None:
    assert timing_of([5.0]) == Timing(5.0, 5.0, 5.0)
    assert timing_of([float(i) for i in range(10, -1, -1)]) == Timing(5.0, 1.0, 9.0)
    row: Row = {}
    assert Timing(2.0, 1.0, 3.0).into(row, "fused") == 2.0
    assert row == {"fused_us": 2.0, "fused_us_low": 1.0, "fused_us_high": 3.0}


def test_every_call_runs() -> None:
    seen: list[int] = []
    time_calls([lambda i=i: seen.append(i) for i in range(3)], torch.device("cpu"))  # type: ignore[misc]
    assert seen == [0, 1, 2]


def test_decode_of_the_large_model_is_measured_first() -> None:
    order = [(model, m) for model, _, m in layer_table.order(GPU)]
    assert order[:4] == [("32b", 1)] * 4
    assert order[4:8] == [("8b", 1)] * 4
    assert order[8:16] == [("32b-2p", 1)] * 4 + [("32b-4p", 1)] * 4
    assert len(order) == len(set(layer_table.order(GPU))) == 2 * 4 * 9 + 2 * 4
    assert {model for model, *_ in layer_table.order(CPU)} == {"tiny", "tiny-3p"}


def test_the_layers_of_a_model_fit_each_other() -> None:
    for shapes in MODELS.values():
        hidden = shapes["qkv"].k
        assert shapes["o"].n == shapes["down"].n == shapes["gate_up"].k == hidden
        assert shapes["o"].k <= shapes["qkv"].n
        assert shapes["gate_up"].n == 2 * shapes["down"].k
    for planes in (1, 2, 3, 4):
        spec = MODELS[with_planes("32b", planes)]["down"].spec()
        assert (spec.out_features, spec.in_features, spec.rotation_groups) == (5120, 25600, 8)
        assert spec.planes == planes


def test_smoke_cases_have_names_of_their_own() -> None:
    cases = smoke_cases(GPU.models + GPU.decoded)
    names = [str(case) for case in cases]
    assert len(names) == len(set(names))
    assert {35, 48} <= {case.spec.rank for case in cases}
    assert {case.spec.planes for case in cases} == {1, 2, 3, 4}
