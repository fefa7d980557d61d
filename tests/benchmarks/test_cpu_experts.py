"""The benchmark of experts: what it times is the layer that it names."""

import torch
from bwla_kernels.experts.spec import expect_stacked

from benchmarks.kernels import cpu_experts as bench


def test_the_layer_is_that_of_qwen3_30b_a3b() -> None:
    spec = bench.make_spec(16)
    assert (spec.hidden_size, spec.intermediate_size, spec.experts) == (2048, 768, 128)
    assert (spec.gate_up.rank, spec.down.rank) == (16, 16)
    assert (spec.gate_up.rotation_groups, spec.down.rotation_groups) == (1, 8)


def test_tensors_fit_the_layer() -> None:
    spec = bench.make_spec(1)
    tensors = bench.random_projection(spec.down, torch.Generator().manual_seed(0))
    expect_stacked("down", tensors, spec.experts, spec.down)


def test_every_routing_chooses_distinct_experts_with_weights_that_add_up() -> None:
    routes = bench.routings(5, torch.Generator().manual_seed(0))
    assert len(routes) == bench.ROUTINGS
    for weights, ids in routes:
        assert ids.shape == weights.shape == (5, 8)
        assert all(len(row.unique()) == 8 for row in ids)
        torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    assert not torch.equal(routes[0][1], routes[1][1])
