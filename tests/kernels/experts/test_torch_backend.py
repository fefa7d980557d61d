"""The choice of a backend for experts, and the one that runs them anywhere."""

from dataclasses import replace

import pytest
import torch
from bwla_kernels import ops
from bwla_kernels.errors import BackendError
from bwla_kernels.experts import ExpertsSpec
from bwla_kernels.format import LayerSpec
from experts_cases import random_case

SPEC = ExpertsSpec(4, LayerSpec(128, 96, 1, 8, 12, rank=2), LayerSpec(96, 64, 2, 4, 8, planes=2))
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [backend.name for backend in ops.experts_backends()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_agrees_with_the_reference(name: str, dtype: torch.dtype) -> None:
    backend = {backend.name: backend for backend in ops.experts_backends()}[name]
    able, reason = backend.can_implement(SPEC, CPU)
    if not able:
        pytest.skip(reason)
    case = random_case(SPEC, 6, 2)
    case = replace(case, x=case.x.to(dtype))
    tensors = backend.prepare(case.gate_up, case.down, SPEC)
    y, want = backend.apply(case.x, case.weights, case.ids, tensors, SPEC), case.reference()
    assert y.dtype == dtype
    assert (y.float() - want.float()).norm() <= 5e-3 * want.float().norm()


def test_what_no_kernel_computes_runs_in_torch() -> None:
    weight_only = replace(SPEC, gate_up=replace(SPEC.gate_up, bits=16))
    backend, reason = ops.select_experts_backend(weight_only, CPU)
    assert backend.name == "torch"
    assert "plain torch runs anywhere" in reason


def test_a_backend_that_cannot_is_refused_in_words() -> None:
    with pytest.raises(BackendError, match="backend 'fast' does not exist"):
        ops.select_experts_backend(SPEC, CPU, "fast")
    with pytest.raises(BackendError, match="backend 'cpu' cannot run ExpertsSpec"):
        ops.select_experts_backend(replace(SPEC, gate_up=replace(SPEC.gate_up, bits=16)), CPU, "cpu")
