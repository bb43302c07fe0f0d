"""Time on a GPU: replays of a CUDA graph between two events, with its L2 warm or cold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Stopwatch(Protocol):
    """What `replays` measures with: a device's events, or a test's clock."""

    def replay(self) -> None: ...
    def flush(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def seconds(self) -> list[float]: ...


def replays(watch: Stopwatch, count: int, calls: int, cold: bool) -> list[float]:
    """Seconds of one call in each of `count` rounds, where a replay is
    `calls` of them.

    Cold: the L2 is written over before each replay, outside the interval. A graph that is to be
    timed cold holds one call, since its second would find the inputs of its first.
    """
    if cold and calls != 1:
        raise ValueError(f"calls must be 1 where the L2 is to be cold, got {calls}")
    for _ in range(3):
        watch.replay()
    for _ in range(count):
        if cold:
            watch.flush()
        watch.start()
        watch.replay()
        watch.stop()
    return [seconds / calls for seconds in watch.seconds()]


class Graph:
    """`calls` calls of `run`, captured; events around each replay, read once at the end."""

    def __init__(self, run: Callable[[], object], calls: int) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # what compiles at the first call does so here
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(calls):
                run()
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._other = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def replay(self) -> None:
        self._graph.replay()

    def flush(self) -> None:
        self._other.zero_()

    def start(self) -> None:
        pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        self._events.append(pair)
        pair[0].record()

    def stop(self) -> None:
        self._events[-1][1].record()

    def seconds(self) -> list[float]:
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(stop) for start, stop in self._events]


def warm_and_cold(run: Callable[[], object], count: int) -> tuple[list[float], list[float]]:
    """Seconds a call with the L2 as the call before left it, and written over."""
    calls = 20
    return (
        replays(Graph(run, calls), count, calls, cold=False),
        replays(Graph(run, 1), count, 1, cold=True),
    )
