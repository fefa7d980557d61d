"""Time launches in CUDA graphs with cold weights; return the median and its spread."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.kernels.gpu.journal import Row

REPLAYS = 15
REPLAY_US, MOST_ROUNDS = 2000.0, 16
"""Calls are repeated within a graph until a replay takes about this long, so that the few microseconds of starting it
do not matter."""

COLD_FACTOR = 4
"""Size of the weights of a round as a multiple of the L2 cache."""

MAX_COPIES = 64
COPY_BYTES = 1 << 31
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call: median, 10th and 90th percentile of the replays."""

    median: float
    low: float
    high: float

    def into(self, row: Row, name: str) -> float:
        """Store as `NAME_us`, `NAME_us_low` and `NAME_us_high` in `row`; return the median."""
        row |= {f"{name}_us": self.median, f"{name}_us_low": self.low, f"{name}_us_high": self.high}
        return self.median


def timing_of(samples: Sequence[float]) -> Timing:
    """Summarize samples in microseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[math.floor(0.1 * last)], ordered[math.ceil(0.9 * last)])


def time_events(run: Call, calls: int = 1, replays: int = REPLAYS) -> Timing:
    """Time `run`, which makes `calls` calls, on the current stream with CUDA events."""
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
    """Time calls that are captured in one CUDA graph; on the CPU, time one run of each call.

    Short calls are repeated within the graph. Everything before the capture runs on the current stream, which the
    capture waits for: two streams must not run one layer at the same time, since they would share its split counters.
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
    # Not torch.cuda.graph, which collects garbage and empties the allocator's cache first: half a second per capture.
    with torch.cuda.stream(stream):
        graph.capture_begin()
        kept = [one() for _ in range(rounds) for one in calls]  # freed results would share memory
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    timing = time_events(graph.replay, rounds * len(calls), replays)
    del kept
    return timing


def copies_for(weight_bytes: float, device: torch.device, most: int = MAX_COPIES) -> int:
    """Return the number of copies of a weight that exceed the L2 cache COLD_FACTOR times: at least 2, at most `most`.

    In the interpreter, which is slow, it is 1.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(most, math.ceil(COLD_FACTOR * cache / weight_bytes)))


def copy_tb_s(device: torch.device) -> float:
    """Return the bandwidth of a device-to-device copy in TB/s, bytes read plus bytes written."""
    size = COPY_BYTES if device.type == "cuda" else 1 << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy: Call = lambda: target.copy_(source)  # noqa: E731
    # Without a graph, whose memory-copy nodes reach only 2.8 TB/s on an H200 that reads weights at 4.3.
    timing = time_events(copy) if device.type == "cuda" else time_calls([copy], device)
    speed = 2 * size / timing.median / 1e6
    if not torch.equal(source, target):
        raise RuntimeError("expected a device-to-device copy to equal its source, found a difference")
    return speed
