"""Timing on a GPU: replays of a CUDA graph, by events and by CUPTI, with L2 warm and cold."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

WARM_UP = 3
# A warm replay is made to take this long, with at most MOST_CALLS calls, so the host stays ahead.
REPLAY_SECONDS = 200e-6
MOST_CALLS = 20

Times = dict[str, list[float]]
Timer = Callable[[Callable[[], object], int, str], Times]


class Stopwatch(Protocol):
    """The clock of `replays`: a device's events, or a stand-in in tests."""

    def replay(self) -> None: ...
    def flush(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def seconds(self) -> list[float]: ...


def replays(watch: Stopwatch, count: int, calls: int, cold: bool) -> list[float]:
    """Seconds per call in each of `count` rounds; a replay makes `calls` calls.

    With `cold`, L2 is overwritten before each replay, outside the interval. A graph must then hold
    one call, since a second would find the inputs of the first in L2.
    """
    if cold and calls != 1:
        raise ValueError(f"calls must be 1 with cold=True, got {calls}")
    for _ in range(WARM_UP):
        watch.replay()
    for _ in range(count):
        if cold:
            watch.flush()
        watch.start()
        watch.replay()
        watch.stop()
    return [seconds / calls for seconds in watch.seconds()]


class Graph:
    """`calls` captured calls of `run`, with events around each replay that are read at the end."""

    def __init__(self, run: Callable[[], object], calls: int, device: str = "cuda") -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # kernels compile on the first call
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(calls):
                run()
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._other = torch.empty(2 * size, dtype=torch.uint8, device=device)
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


def by_events(run: Callable[[], object], count: int, device: str) -> Times:
    """Seconds per call, with L2 as the previous call left it and with L2 overwritten."""
    cold = replays(Graph(run, 1, device), count, 1, cold=True)
    calls = min(MOST_CALLS, 1 + int(REPLAY_SECONDS / statistics.median(cold)))
    return {"warm": replays(Graph(run, calls, device), count, calls, cold=False), "cold": cold}


@contextlib.contextmanager
def cupti_records(completed: Callable[[Sequence[Any]], None]) -> Iterator[None]:
    """Pass CUPTI's records of kernels, copies and memsets to `completed`, and flush at the end."""
    from cupti import cupti

    kinds = [getattr(cupti.ActivityKind, k) for k in ("CONCURRENT_KERNEL", "MEMCPY", "MEMSET")]
    try:
        for kind in kinds:
            cupti.activity_enable(kind)
        cupti.activity_register_callbacks(lambda: (8 << 20, 0), completed)
        yield
        torch.cuda.synchronize()
        cupti.activity_flush_all(1)
    finally:
        for kind in kinds:
            cupti.activity_disable(kind)
        # Detach: the events of the next graph must not be timed under CUPTI.
        cupti.finalize()


def by_cupti(run: Callable[[], object], count: int, device: str) -> Times:
    """Seconds from the start of a call's first kernel to the end of its last, L2 warm and cold."""
    times = {}
    for l2 in ("warm", "cold"):
        spans: dict[int, tuple[int, int]] = {}

        def note(records: Sequence[Any], spans: dict[int, tuple[int, int]] = spans) -> None:
            for record in records:
                # Only the flush is launched outside a graph. A replay has one correlation id.
                if record.graph_id:
                    start, end = spans.get(record.correlation_id, (record.start, record.end))
                    span = (min(start, record.start), max(end, record.end))
                    spans[record.correlation_id] = span

        # Enabled before the capture: CUPTI has to see the graph being built.
        with cupti_records(note):
            replays(Graph(run, 1, device), count, 1, cold=l2 == "cold")
        if len(spans) != WARM_UP + count:
            raise RuntimeError(f"CUPTI recorded {len(spans)} of {WARM_UP + count} replays")
        last = sorted(spans.values())[-count:]
        times[l2] = [1e-9 * (end - start) for start, end in last]
    return times


def timers() -> dict[str, Timer]:
    """The available timers: events always, CUPTI if cupti-python is installed."""
    found: dict[str, Timer] = {"graph": by_events}
    try:
        from cupti import cupti  # noqa: F401
    except Exception as error:
        print(f"timer cupti is unavailable: {error}")
    else:
        found["cupti"] = by_cupti
    return found
