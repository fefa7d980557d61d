"""The time of a conversion is split by phase without a change to the converter, and nothing is counted twice."""

import threading
from collections.abc import Iterator
from itertools import count

import pytest
from bwla_converter.quantize import fast
from bwla_converter.quantize.moments import Moments
from bwla_converter.quantize.okt import rotation

from benchmarks.conversion.speed_phases import OTHER, PHASES, PhaseClock, counted, find, phases_counted


class Ticks:
    """A clock that only advances when it is asked to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def advance(self, seconds: float) -> None:
        self.seconds += seconds

    def read(self) -> tuple[float, float]:
        return self.seconds, self.seconds / 2


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def clock(ticks: Ticks) -> PhaseClock:
    return PhaseClock(ticks.read)


def seconds_of(clock: PhaseClock) -> dict[str, float]:
    return {name: part["seconds"] for name, part in clock.totals().items()}


def test_a_phase_excludes_the_phases_within_it(clock: PhaseClock, ticks: Ticks) -> None:
    ticks.advance(1)
    with clock.phase("outer"):
        ticks.advance(2)
        with clock.phase("inner"):
            ticks.advance(4)
        ticks.advance(8)
    ticks.advance(16)
    assert seconds_of(clock) == {OTHER: 17, "outer": 10, "inner": 4}


def test_cpu_seconds_are_counted_beside_seconds(clock: PhaseClock, ticks: Ticks) -> None:
    with clock.phase("work"):
        ticks.advance(4)
    assert clock.totals()["work"] == {"seconds": 4, "cpu_seconds": 2}


def test_an_exception_ends_its_phase(clock: PhaseClock, ticks: Ticks) -> None:
    with pytest.raises(KeyError), clock.phase("fails"):
        raise KeyError
    ticks.advance(3)
    assert seconds_of(clock)[OTHER] == 3


def test_phases_of_other_threads_are_ignored(clock: PhaseClock) -> None:
    def work() -> None:
        with clock.phase("elsewhere"):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "elsewhere" not in clock.totals()


def test_a_generator_is_counted_while_it_computes_a_value(clock: PhaseClock, ticks: Ticks) -> None:
    def generate(values: int) -> Iterator[int]:
        for value in range(values):
            ticks.advance(1)
            yield value

    found = []
    for value in counted(clock, "generator", generate)(3):
        ticks.advance(10)
        found.append(value)
    assert found == [0, 1, 2]
    assert seconds_of(clock) == {"generator": 3, OTHER: 30}


def test_a_phase_may_depend_on_the_arguments(clock: PhaseClock) -> None:
    numbers = count()
    call = counted(clock, lambda name: f"phase {name}", lambda name: next(numbers))
    assert [call("a"), call("b")] == [0, 1]
    assert {"phase a", "phase b"} <= clock.totals().keys()


def test_functions_are_wrapped_wherever_they_were_imported_and_restored(clock: PhaseClock) -> None:
    learn_rotation, add = rotation.learn_rotation, Moments.add
    with phases_counted(clock):
        assert fast.learn_rotation is rotation.learn_rotation is not learn_rotation
        assert Moments.add is not add
    assert fast.learn_rotation is rotation.learn_rotation is learn_rotation
    assert Moments.add is add


@pytest.mark.parametrize(
    "path", ["quantize.okt.rotation:no_such_function", "quantize.nothing:f", "quantize.moments:Moments.count"]
)
def test_a_name_that_is_no_function_is_refused(clock: PhaseClock, path: str) -> None:
    with (
        pytest.raises(LookupError, match=f"bwla_converter.{path}: expected a function, found none"),
        phases_counted(clock, {path: "phase"}),
    ):
        pass


@pytest.mark.parametrize("path", PHASES)
def test_every_function_of_the_table_exists(path: str) -> None:
    function, places = find(path)
    assert places
    assert function.__qualname__ == path.partition(":")[2]
