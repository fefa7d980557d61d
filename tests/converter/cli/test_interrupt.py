"""Ctrl-C: the first waits for the block, the second does not."""

import os
import signal

import pytest
from bwla_converter.cli.interrupt import Interrupts, handled


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_lets_the_block_be_finished(said: list[str], number: int, code: int) -> None:
    interrupts = Interrupts(said.append)
    with handled(interrupts):
        interrupts.layer_started(3)
        os.kill(os.getpid(), number)
        assert said == ["block 3 is being finished and kept; once more stops at once, without it"]
        with pytest.raises(KeyboardInterrupt):
            interrupts.layer_done()
    assert interrupts.exit_code == code


def test_the_second_signal_stops_at_once(said: list[str]) -> None:
    interrupts = Interrupts(said.append)
    with handled(interrupts):
        interrupts.layer_started(0)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_between_blocks_there_is_nothing_to_wait_for(said: list[str]) -> None:
    interrupts = Interrupts(said.append)
    with handled(interrupts):
        interrupts.layer_started(0)
        interrupts.layer_done()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert said == []


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with handled(Interrupts(print)):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
