"""Ctrl-C: the first waits for the decoder layer, the second does not."""

import os
import signal

import pytest
from bwla_converter.cli.interrupt import Interrupts, handled


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_lets_the_layer_be_finished(lines: list[str], number: int, code: int) -> None:
    interrupts = Interrupts(lines.append)
    with handled(interrupts):
        interrupts.layer_started(3)
        os.kill(os.getpid(), number)
        assert lines == ["finishing layer 3 before stopping; interrupt again to stop at once and lose it"]
        with pytest.raises(KeyboardInterrupt):
            interrupts.layer_done()
    assert interrupts.exit_code == code


def test_the_second_signal_stops_at_once(lines: list[str]) -> None:
    interrupts = Interrupts(lines.append)
    with handled(interrupts):
        interrupts.layer_started(0)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_between_layers_there_is_nothing_to_wait_for(lines: list[str]) -> None:
    interrupts = Interrupts(lines.append)
    with handled(interrupts):
        interrupts.layer_started(0)
        interrupts.layer_done()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert lines == []


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with handled(Interrupts(print)):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
