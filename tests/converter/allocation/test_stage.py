"""The options of the allocation: which fit together, and what they make of a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bwla_converter.allocation.sensitivity import Sensitivity
from bwla_converter.allocation.stage import allocate, check_targets
from bwla_converter.options import Calibration, Options
from bwla_converter.planning.plan import make_plan
from bwla_converter.source.model import open_source
from bwla_kernels.errors import BWLAError
from bwla_kernels.format.schema import Provenance

OPTIONS = Options("model", Path("out"), recipe="fast", calibration=Calibration("text.txt"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"target_bits": 2.2, "target_loss": 0.1},
            "expected one of --bits, --loss and --planes, found --bits and --loss",
        ),
        ({"target_bits": 2.2, "planes": 2}, "found --bits and --planes"),
        ({"target_bits": 1.0}, "--bits: expected 1.1 to 4.5 bits per weight, everything counted, found 1"),
        ({"target_bits": 5.0}, "found 5"),
        ({"target_loss": 0.0}, "--loss: expected nats per token above 0, found 0"),
        ({"target_loss": 0.1, "calibration": None}, "--loss: expected calibration text"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BWLAError, match=sentence.replace("(", r"\(")):
        check_targets(replace(OPTIONS, **changes))
    check_targets(OPTIONS)
    check_targets(replace(OPTIONS, target_bits=2.2))


@pytest.fixture
def case(make_model) -> tuple[Any, list[list[str]], dict[str, Sensitivity]]:
    source = open_source(str(make_model()), ())
    groups = [names for index in range(source.num_layers) for _, names in source.groups_of_layer(index)]
    sensitivities = {names[0]: Sensitivity(3.0**number, 1.0) for number, names in enumerate(groups)}
    return make_plan(source, 2, 6, 1.0, Provenance()), groups, sensitivities


def test_without_a_target_the_plan_stays(case: Any) -> None:
    allocation = allocate(case[0], case[1], OPTIONS, case[2])
    assert allocation.plan == case[0]
    assert allocation.predicted_loss > 0


def test_the_table_of_planes_is_that_of_the_specs(case: Any) -> None:
    allocation = allocate(case[0], case[1], replace(OPTIONS, target_bits=3.9), case[2])
    plan = allocation.plan
    assert plan.rank == 0
    assert plan.format.format_version == 2
    assert len({spec.planes for spec in plan.specs.values()}) > 1
    for name, spec in plan.specs.items():
        assert plan.format.layer_spec(name, spec.out_features, spec.in_features) == replace(spec, bias=False)
    for names in case[1]:
        assert len({plan.specs[name].planes for name in names}) == 1
    assert sum(plan.weights_by_planes.values()) == plan.weights


def test_a_loss_may_choose_eight_activation_bits(case: Any) -> None:
    total = sum(found.weights for found in case[2].values())
    options = replace(OPTIONS, target_loss=0.05 * total)
    assert allocate(case[0], case[1], options, case[2]).plan.format.bits == 6
    loud = {name: Sensitivity(found.weights, 100 * found.weights) for name, found in case[2].items()}
    chosen = allocate(case[0], case[1], options, loud)
    assert chosen.plan.format.bits == 8
    assert chosen.predicted_loss <= 0.05 * total
    with pytest.raises(BWLAError, match="6-bit activations"):
        allocate(case[0], case[1], replace(options, bits=6), loud)


def test_what_four_planes_leave_goes_to_the_low_rank_correction(case: Any) -> None:
    roomy = allocate(case[0], case[1], replace(OPTIONS, target_bits=4.5, rank=None), case[2]).plan
    if {spec.planes for spec in roomy.specs.values()} == {4}:
        assert roomy.bits_per_weight <= 4.5
