"""Convert a model and start the servers of the demo, as far as possible at the same time."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.server import Server, serve
from scripts.demo.models import Conversion, DemoError, DemoModel

CONTEXT = 1024
SIDE_BY_SIDE = {"OMP_WAIT_POLICY": "passive"}
"""Environment of conversions: threads that wait leave the processor to the other conversion and to servers."""


@dataclass(frozen=True)
class Serving:
    """How models are served.

    Attributes:
        compiled: whether vLLM compiles them, which takes longer to start.
        start_seconds: time that a server may take to start.
        folder: where the logs go.
    """

    compiled: bool
    start_seconds: float
    folder: Path

    @property
    def flags(self) -> list[str]:
        """Return the arguments of `vllm serve` after the model."""
        return ["--max-model-len", str(CONTEXT), *([] if self.compiled else ["--enforce-eager"])]


class Preparation:
    """Converts and serves the models of a demo.

    Args:
        model: the model.
        out: folder for the checkpoints.
        serving: how the models are served.
        running: ends the conversions that still run.
        served: stops the servers.
    """

    def __init__(
        self, model: DemoModel, out: Path, serving: Serving, running: ExitStack, served: ExitStack
    ) -> None:
        self.model, self.out, self.serving, self.running, self.served = model, out, serving, running, served

    def show(self) -> None:
        """Print the commands."""
        for number, conversion in enumerate(self.model.conversions):
            redirected = ["&>", str(self.log_of(conversion)), "&"] if number else []
            print("$", *self._command(conversion), *redirected, flush=True)
        for folder in (self.model.folder(), *(self.out / each.folder for each in self.model.conversions)):
            print("$ vllm serve", folder, *self.serving.flags, flush=True)

    def serve(self, folder: Path) -> Server:
        """Start a server."""
        log = self.serving.folder / f"{folder.name}.log"
        server = serve(folder, log, self.serving.flags, health_seconds=self.serving.start_seconds)
        return self.served.enter_context(server)

    def convert_and_serve(self, conversion: Conversion) -> Server:
        """Run bwla-convert, then start a server.

        The progress of the first conversion is shown, that of the others goes to a file.

        Raises:
            DemoError: bwla-convert failed.
        """
        shown = conversion is self.model.conversions[0]
        with ExitStack() as stack:
            log = None if shown else stack.enter_context(self.log_of(conversion).open("wb"))
            process = subprocess.Popen(
                self._command(conversion), stdout=log, stderr=log, env={**SIDE_BY_SIDE, **os.environ}
            )
            self.running.callback(process.kill)
            if process.wait():
                where = "above" if shown else self.log_of(conversion)
                raise DemoError(f"bwla-convert failed, see {where}")
        return self.serve(self.out / conversion.folder)

    def log_of(self, conversion: Conversion) -> Path:
        """Return the file for the output of a conversion whose progress is not shown."""
        return self.out / f"{conversion.folder}-conversion.log"

    def _command(self, conversion: Conversion) -> list[str]:
        program = Path(sys.executable).with_name("bwla-convert")
        folder = self.out / conversion.folder
        return [
            str(part) for part in (program, self.model.source, folder, "--overwrite", *conversion.options)
        ]


@contextmanager
def prepared(model: DemoModel, out: Path, serving: Serving) -> Iterator[Callable[[], list[Server]]]:
    """Convert the model and serve the original and all conversions while the body of the with statement runs.

    Yields: a function that waits until all is ready, and returns the servers of the original and of each conversion.
        It raises DemoError or ServerError if a step fails.
    """
    count = 1 + len(model.conversions)
    # Left from the last to the first: conversions are ended, servers that are starting are waited for, all are stopped.
    with ExitStack() as served, ThreadPoolExecutor(count) as pool, ExitStack() as running:
        preparation = Preparation(model, out, serving, running, served)
        preparation.show()
        steps = [pool.submit(preparation.serve, model.folder())]
        steps += [pool.submit(preparation.convert_and_serve, conversion) for conversion in model.conversions]

        def waiting() -> list[Server]:
            wait(steps, return_when=FIRST_EXCEPTION)
            failed = [step for step in steps if step.done() and step.exception()]
            return [step.result() for step in failed or steps]

        yield waiting
