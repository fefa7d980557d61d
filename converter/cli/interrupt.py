"""Ctrl-C and SIGTERM: the first lets the block at hand be finished and kept, the second stops at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """What the signals so far ask for.

    Attributes:
        signal: the last one that came, 0 for none.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal = 0
        self._say = say
        self._block: int | None = None

    @property
    def exit_code(self) -> int:
        """What a runner expects of a process that ended so: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def layer_started(self, index: int) -> None:
        """From here on there is something worth finishing."""
        self._block = index

    def layer_done(self) -> None:
        """The block is safe.

        Raises:
            KeyboardInterrupt: a signal has waited for this.
        """
        self._block = None
        if self.signal:
            raise KeyboardInterrupt

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The signals' handler."""
        again, self.signal = bool(self.signal), number
        if again or self._block is None:
            raise KeyboardInterrupt
        self._say(f"block {self._block} is being finished and kept; once more stops at once, without it")


@contextmanager
def handled(interrupts: Interrupts) -> Iterator[None]:
    """Let `interrupts` have Ctrl-C and SIGTERM while the body runs."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupts.handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
