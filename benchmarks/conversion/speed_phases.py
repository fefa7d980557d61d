"""Split the time of a conversion by phase, from outside: the converter's functions are wrapped while it runs.

`PHASES` says which function belongs to which phase. The time of a function without that of the wrapped functions that
it calls counts for its phase, and what is in no wrapped function counts as "other".
"""

import inspect
import pkgutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from bwla_converter.calibration.stepwise import StepwiseLayer
from bwla_converter.hf.modules import BWLALinear

OTHER = "other"
PACKAGE = "bwla_converter"


def text_phase(layer: StepwiseLayer, *_: object) -> str:
    """Return the phase of running text through a layer, which is quantized as soon as one of its linears is."""
    quantized = any(isinstance(module, BWLALinear) for module in layer.layer.layer.modules())
    return f"text through the {'quantized' if quantized else 'original'} layers"


Phase = str | Callable[..., str]

PHASES: Mapping[str, Phase] = {
    "source.model:open_source": "reading and checking",
    "source.model:check_values": "reading and checking",
    "source.model:Source.read": "reading and checking",
    "calibration.text:calibration_samples": "reading and checking",
    "planning.budget:predict": "reading and checking",
    "quantize.group:check_group": "reading and checking",
    "resume.fingerprint:mark_files": "reading and checking",
    "resume.fingerprint:changed_file": "reading and checking",
    "calibration.loop:CalibrationLoop.begin_layer": "text through the original layers",
    "calibration.stepwise:StepwiseLayer.inputs_of": text_phase,
    "calibration.stepwise:StepwiseLayer.outputs": text_phase,
    "quantize.moments:Moments.add": "moments",
    "quantize.moments:Moments.add_error": "moments",
    "quantize.moments:Moments.hessian": "moments",
    "quantize.okt.rotation:learn_rotation": "rotation",
    "quantize.data_free:_rotate_rows": "rotation",
    "quantize.moments:rotate_hessian": "rotation",
    "quantize.fast:start_state": "targets",
    "quantize.fast:corrected_target": "targets",
    "quantize.paper:start_state": "targets",
    "quantize.fast:column_scale_step": "column scales",
    "quantize.fast:low_rank_step": "low-rank correction",
    "quantize.low_rank.psp:proximal_low_rank": "low-rank correction",
    "quantize.data_free:_low_rank": "low-rank correction",
    "quantize.fast:binarization_step": "sign search",
    "quantize.binarize:fit_scales": "row and column scales",
    "quantize.binarize:unbiased": "row and column scales",
    "quantize.fast:clip_of": "activation clip",
    "allocation.sensitivity:measure_sensitivities": "sensitivities",
    "evaluation.loss:measure_loss": "measured loss",
    "recipes.best:BestRecipe._tune": "tuning",
    "recipes.best:BestRecipe._loss": "tuning",
    "recipes.best:BestRecipe.finish": "distillation",
    "calibration.loop:CalibrationLoop.fit_final_norm": "final norm",
    "quantize.group:relative_error": "statistics and report",
    "report.write:group_statistics": "statistics and report",
    "report.write:write_documents": "statistics and report",
    "report.samples:make_samples": "text samples of the report",
    "quantize.group:store_group": "writing",
    "checkpoint.writer:CheckpointWriter.write_shard": "writing",
    "checkpoint.writer:CheckpointWriter.finish": "writing",
    "checkpoint.layout:int8_tensors": "writing",
    "checkpoint.layout:verify": "writing",
    "resume.work_folder:WorkFolder.commit_layer": "writing",
    "resume.work_folder:WorkFolder.replace": "writing",
    "resume.work_folder:WorkFolder.publish": "writing",
}
"""`module:function` inside bwla_converter -> its phase, or what returns it for the function's arguments."""


def now() -> tuple[float, float]:
    """Return the seconds and this process's CPU seconds since some moment."""
    return time.perf_counter(), time.process_time()


class PhaseClock:
    """Seconds and CPU seconds of each phase, exclusive of the phases within it, for one thread.

    Args:
        read: returns seconds and CPU seconds.
    """

    def __init__(self, read: Callable[[], tuple[float, float]] = now) -> None:
        self._read, self._last = read, read()
        self._thread = threading.get_ident()
        self._phases = [OTHER]
        self._totals: dict[str, tuple[float, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the body for the phase `name`; in any other thread than this object's, do nothing."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._count()
        self._phases.append(name)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()

    def totals(self) -> dict[str, dict[str, float]]:
        """Return phase -> `seconds` and `cpu_seconds`, the longest phase first. Their sums are the time so far."""
        self._count()
        longest_first = sorted(self._totals.items(), key=lambda item: -item[1][0])
        return {
            name: {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
            for name, (seconds, cpu_seconds) in longest_first
        }

    def _count(self) -> None:
        """Add the time since the last call to the innermost phase."""
        moment = self._read()
        before = self._totals.get(self._phases[-1], (0.0, 0.0))
        self._totals[self._phases[-1]] = (
            before[0] + moment[0] - self._last[0],
            before[1] + moment[1] - self._last[1],
        )
        self._last = moment


@contextmanager
def phases_counted(clock: PhaseClock, phases: Mapping[str, Phase] = PHASES) -> Iterator[None]:
    """Wrap the functions named in `phases` while the body runs, so that `clock` counts their phases.

    Raises:
        LookupError: a function does not exist.
    """
    with ExitStack() as stack:
        for path, phase in phases.items():
            function, places = find(path)
            wrapper = counted(clock, phase, function)
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, wrapper))
        yield


def find(path: str) -> tuple[Callable[..., Any], list[tuple[Any, str]]]:
    """Find a function of the converter.

    Args:
        path: a key of `PHASES`.

    Returns: the function, and every class or module with the attribute by which it is found there: a function of a
        module is also an attribute of the modules that import it by its name.

    Raises:
        LookupError: there is no such function.
    """
    module, _, qualified_name = path.partition(":")
    owner_name, _, name = qualified_name.rpartition(".")
    try:
        owner = pkgutil.resolve_name(f"{PACKAGE}.{module}:{owner_name}")
        function = vars(owner)[name]
    except (ImportError, AttributeError, KeyError):
        function = None
    if not inspect.isfunction(function):
        raise LookupError(
            f"{PACKAGE}.{path}: expected a function, found none: was it renamed? Change PHASES in {__name__}"
        )
    if owner_name:
        return function, [(owner, name)]
    modules = [module for key, module in list(sys.modules.items()) if key.split(".")[0].startswith("bwla_")]
    return function, [
        (module, key) for module in modules for key, value in list(vars(module).items()) if value is function
    ]


def counted(clock: PhaseClock, phase: Phase, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, during whose calls, or steps if it is a generator function, `clock` counts `phase`."""

    def name_of(*arguments: Any) -> str:
        return phase if isinstance(phase, str) else phase(*arguments)

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with clock.phase(name_of(*arguments)):
            return function(*arguments, **keywords)

    @wraps(function)
    def generate(*arguments: Any, **keywords: Any) -> Iterator[Any]:
        steps, name, done = function(*arguments, **keywords), name_of(*arguments), object()
        while True:
            with clock.phase(name):
                value = next(steps, done)
            if value is done:
                return
            yield value

    return generate if inspect.isgeneratorfunction(function) else call
