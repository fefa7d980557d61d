"""Times of launches: in CUDA graphs, with weights that no cache holds, as a median and its spread."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.kernels.gpu.journal import Row

REPLAYS = 15
REPLAY_US, MOST_ROUNDS = 2000.0, 16
"""A graph holds its calls so often that a replay takes about so long: the few microseconds of starting it are then
nothing to the figure."""

COLD_FACTOR = 4
"""Weights of a round, in second-level caches."""

MAX_COPIES = 64
COPY_BYTES = 1 << 31
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, tenth and ninetieth percentile of the replays."""

    median: float
    low: float
    high: float

    def into(self, row: Row, name: str) -> float:
        """Store as `NAME_us`, `NAME_us_low` and `NAME_us_high`; returns the median."""
        row |= {f"{name}_us": self.median, f"{name}_us_low": self.low, f"{name}_us_high": self.high}
        return self.median


def timing_of(samples: Sequence[float]) -> Timing:
    """Summarize samples in microseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[math.floor(0.1 * last)], ordered[math.ceil(0.9 * last)])


def time_events(run: Call, calls: int = 1, replays: int = REPLAYS) -> Timing:
    """Time `run` on the current stream between CUDA events; it stands for `calls` calls."""
    for _ in range(2):
        run()
    samples = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / calls)
    return timing_of(samples)


def time_calls(calls: Sequence[Call], device: torch.device, replays: int = REPLAYS) -> Timing:
    """Time one call of several, captured in one CUDA graph, several times over where they are short; on the CPU, one
    run of each by the clock.

    Everything before the capture runs on the current stream, which the capture waits for: two streams never run
    one layer, whose split counters they would share.
    """
    if device.type != "cuda":
        samples = []
        for one in calls:
            begun = time.perf_counter()
            one()
            samples.append(1e6 * (time.perf_counter() - begun))
        return timing_of(samples)
    once = time_events(lambda: [one() for one in calls], replays=1).median
    rounds = max(1, min(MOST_ROUNDS, math.ceil(REPLAY_US / once)))
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # (torch.cuda.graph collects garbage and empties the allocator's cache first: half a second for each candidate.)
    with torch.cuda.stream(stream):
        graph.capture_begin()
        kept = [one() for _ in range(rounds) for one in calls]  # results that were freed would share memory
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    timing = time_events(graph.replay, rounds * len(calls), replays)
    del kept
    return timing


def copies_for(weight_bytes: float, device: torch.device, most: int = MAX_COPIES) -> int:
    """Copies of a weight that together are COLD_FACTOR times the second-level cache: at least 2, at most `most`.

    In the interpreter one, which is slow enough.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, math.ceil(COLD_FACTOR * cache / weight_bytes)))


def copy_tb_s(device: torch.device) -> float:
    """Bandwidth of a device-to-device copy, bytes read and bytes written, in TB/s."""
    size = COPY_BYTES if device.type == "cuda" else 1 << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy: Call = lambda: target.copy_(source)  # noqa: E731
    # Not in a graph: there it is a node of its own kind, which moved 2.8 TB/s on an H200 that reads weights at 4.3.
    timing = time_events(copy) if device.type == "cuda" else time_calls([copy], device)
    speed = 2 * size / timing.median / 1e6
    if not torch.equal(source, target):
        raise RuntimeError("a copy from device to device differs from its source")
    return speed
