"""Stages contain every layer once, and together do the requested amount of training."""

import pytest
from bwla_converter.source.model import open_source
from bwla_converter.training.optimize import TuneOptions
from bwla_converter.training.stages import Stage, make_stages, split_budget


def test_stages_contain_every_layer_once(make_model) -> None:
    source = open_source(str(make_model("Qwen3", num_hidden_layers=5)))
    [stage] = make_stages(source)
    assert stage.layers == (0, 1, 2, 3, 4)
    weights = stage.weights // 5
    assert make_stages(source, 2 * weights) == [
        Stage((0, 1), 2 * weights),
        Stage((2, 3), 2 * weights),
        Stage((4,), weights),
    ]
    assert make_stages(source, 1) == [Stage((index,), weights) for index in range(5)]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shares_are_the_whole_work(parts: int) -> None:
    options = TuneOptions(epochs=3, batch=2, minutes=6.0)
    shares = split_budget(options, 5, parts)
    assert len(shares) == parts
    steps = [share.steps(5) for share in shares]
    assert sum(steps) == options.steps(5) == 9
    assert max(steps) - min(steps) <= 1
    assert sum(share.minutes or 0.0 for share in shares) == pytest.approx(6.0)


def test_no_limit_stays_none_and_a_limit_of_steps_is_kept() -> None:
    shares = split_budget(TuneOptions(epochs=3, max_steps=4), 10, 2)
    assert [share.steps(10) for share in shares] == [2, 2]
    assert shares[0].minutes is None
