"""Run the steps of a case in a process of its own, so that one which crashes or hangs is one failure.

The processes are forked from a server that has imported everything already, which takes longest.
"""

import json
import multiprocessing
import os
import re
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkServerContext
from pathlib import Path
from typing import Literal

from bwla_kernels.errors import BWLAError
from pydantic import ValidationError

from benchmarks.coverage.cases import CASES
from benchmarks.coverage.steps import Answer, Step, run_step

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCHDYNAMO_DISABLE": "1",
}
"""An engine in the step's own process, on one thread, without network access."""

PRELOADED = "benchmarks.coverage.preload"
LOG = "log"
LONGEST_MESSAGE = 400


class Workers:
    """Processes that run steps."""

    def __init__(self, cache: Path, method: Literal["forkserver", "fork"] = "forkserver") -> None:
        """Set the environment of the processes.

        Args:
            cache: folder for what vLLM caches.
            method: how processes start: from a server that has imported everything, or as copies of this one.
        """
        os.environ.update({**ENVIRONMENT, "VLLM_CACHE_ROOT": str(cache)})
        self._context: ForkServerContext | ForkContext
        if method == "fork":
            self._context = multiprocessing.get_context("fork")
        else:
            self._context = multiprocessing.get_context("forkserver")
            self._context.set_forkserver_preload([PRELOADED])

    def run(self, steps: Sequence[Step], case: str, folder: Path, seconds: float) -> dict[str, Answer]:
        """Run the steps of a case one after another; return what each one gave, by the step's name.

        A step that failed gives {"error": sentence}, and one that needs such a step {"skipped": that step}. After a
        step that ended its process or took too long, the others run in a new one. So does every engine, because vLLM
        changes transformers' classes when it serves a model through them.

        Args:
            steps: the steps.
            case: name of the case.
            folder: an existing folder for the case's files; `LOG` in it receives the output.
            seconds: time limit of a step.
        """
        answers: dict[str, Answer] = {}
        while remaining := [step for step in steps if step.name not in answers]:
            failed = {name for name, answer in answers.items() if is_failure(answer)}
            answers |= self._run_in_one_process(together(remaining), case, folder, (seconds, failed))
        return answers

    def _run_in_one_process(
        self, steps: Sequence[Step], case: str, folder: Path, limits: tuple[float, set[str]]
    ) -> dict[str, Answer]:
        """Run steps in one process, up to one that ends it or takes too long; return the answers.

        Args:
            steps, case, folder: as in `run`.
            limits: time limit of a step, and names of the steps that failed before.
        """
        seconds, failed = limits
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=run_steps, args=(steps, case, folder, failed, sender))
        process.start()
        sender.close()
        answers: dict[str, Answer] = {}
        for step in steps:
            try:
                if not receiver.poll(seconds):
                    answers[step.name] = {"error": f"it took longer than {seconds:g} s"}
                    break
                answers[step.name] = json.loads(receiver.recv())
            except EOFError:
                process.join()
                answers[step.name] = {"error": f"the process ended with exit code {process.exitcode}"}
                break
        process.kill()
        process.join()
        return answers


def together(steps: Sequence[Step]) -> Sequence[Step]:
    """Return the first of the steps that may share a process: one that serves, or all before the first that does."""
    first = next((index for index, step in enumerate(steps) if step.action == "serve"), len(steps))
    return steps[: max(1, first)]


def is_failure(answer: Answer) -> bool:
    """Return whether an answer says that the step failed or was left out."""
    return "error" in answer or "skipped" in answer


def run_steps(steps: Sequence[Step], case: str, folder: Path, failed: set[str], sender: Connection) -> None:
    """Run steps in this process, and send the answer of each one as JSON.

    Args:
        steps: the steps.
        case: name of the case.
        folder: the case's folder.
        failed: names of the steps that failed before.
        sender: receives the answers.
    """
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    failed = set(failed)
    for step in steps:
        print(f"---- {step.name}", flush=True)
        answer: Answer
        if lost := [need for need in step.needs if need in failed]:
            answer = {"skipped": lost[0]}
        else:
            try:
                answer = run_step(step, CASES[case], folder)
            except BaseException as error:
                traceback.print_exc()
                answer = {"error": sentence_of(error)}
        if is_failure(answer):
            failed.add(step.name)
        sender.send(json.dumps(answer))


def sentence_of(error: BaseException) -> str:
    """Return the message of an error in one line; its type comes first unless it is one of ours.

    Of what pydantic raises, which repeats the whole input, it is the first sentence of the first problem.
    """
    if isinstance(error, ValidationError):
        problem = error.errors(include_input=False, include_url=False)[0]["msg"].removeprefix("Value error, ")
        return f"{type(error).__name__}: {re.split(r'(?<=[.]) ', problem)[0]}"
    message = " ".join(str(error).split()) or _place_of(error)
    if not isinstance(error, BWLAError):
        message = f"{type(error).__name__}: {message}"
    return message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 3]}..."


def _place_of(error: BaseException) -> str:
    """Return where an error without a message was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"raised in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "no message"
