"""Ctrl-C and SIGTERM: the first signal lets the current decoder layer be finished, the second stops at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Keeps track of the signals received so far.

    Attributes:
        signal: the last signal received, 0 if there was none.
    """

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self.signal = 0
        self._print_line = print_line
        self._layer: int | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of a process ended by the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def layer_started(self, index: int) -> None:
        """Decoder layer `index` is being quantized, so a signal waits until it is finished."""
        self._layer = index

    def layer_done(self) -> None:
        """The decoder layer is finished and on disk.

        Raises:
            KeyboardInterrupt: a signal was received in the meantime.
        """
        self._layer = None
        if self.signal:
            raise KeyboardInterrupt

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: it is the second one, or no decoder layer is being quantized.
        """
        again, self.signal = bool(self.signal), number
        if again or self._layer is None:
            raise KeyboardInterrupt
        self._print_line(
            f"finishing layer {self._layer} before stopping; interrupt again to stop at once and lose it"
        )


@contextmanager
def handled(interrupts: Interrupts) -> Iterator[None]:
    """Install `interrupts` as the handler of Ctrl-C and SIGTERM while the body runs."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupts.handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
