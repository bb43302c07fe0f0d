"""Time on a GPU: replays of a CUDA graph, by events and by CUPTI, with L2 warm and cold."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

WARM_UP = 3
# A warm replay takes at least this long, in at most MOST_CALLS calls: the host then keeps ahead.
REPLAY_SECONDS = 200e-6
MOST_CALLS = 20

Times = dict[str, list[float]]
Timer = Callable[[Callable[[], object], int, str], Times]


class Stopwatch(Protocol):
    """What `replays` measures with: a device's events, or a test's clock."""

    def replay(self) -> None: ...
    def flush(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def seconds(self) -> list[float]: ...


def replays(watch: Stopwatch, count: int, calls: int, cold: bool) -> list[float]:
    """Seconds per call in each of `count` rounds, where a replay makes `calls` calls.

    Cold: L2 is overwritten before each replay, outside the interval. A graph to be timed cold
    holds one call, since a second would find the inputs of the first.
    """
    if cold and calls != 1:
        raise ValueError(f"calls must be 1 where the L2 is to be cold, got {calls}")
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
    """`calls` calls of `run`, captured; events around each replay, read once at the end."""

    def __init__(self, run: Callable[[], object], calls: int, device: str = "cuda") -> None:
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
    """Seconds per call with L2 as the previous call left it, and overwritten."""
    cold = replays(Graph(run, 1, device), count, 1, cold=True)
    calls = min(MOST_CALLS, 1 + int(REPLAY_SECONDS / statistics.median(cold)))
    return {"warm": replays(Graph(run, calls, device), count, calls, cold=False), "cold": cold}


@contextlib.contextmanager
def cupti_records(completed: Callable[[Sequence[Any]], None]) -> Iterator[None]:
    """Pass CUPTI's records of kernels, copies and memsets to `completed`, the last at the end."""
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
        # Detach, so that the next graph is timed by events without CUPTI.
        cupti.finalize()


def by_cupti(run: Callable[[], object], count: int, device: str) -> Times:
    """Seconds from the start of a call's first kernel to the end of its last, L2 warm and cold."""
    times = {}
    for l2 in ("warm", "cold"):
        spans: dict[int, tuple[int, int]] = {}

        def note(records: Sequence[Any], spans: dict[int, tuple[int, int]] = spans) -> None:
            for record in records:
                # What is launched outside a graph is the flush. A replay has one correlation id.
                if record.graph_id:
                    start, end = spans.get(record.correlation_id, (record.start, record.end))
                    span = (min(start, record.start), max(end, record.end))
                    spans[record.correlation_id] = span

        # Before the capture: CUPTI has to see how the graph is made.
        with cupti_records(note):
            replays(Graph(run, 1, device), count, 1, cold=l2 == "cold")
        if len(spans) != WARM_UP + count:
            raise RuntimeError(f"CUPTI recorded {len(spans)} of {WARM_UP + count} replays")
        last = sorted(spans.values())[-count:]
        times[l2] = [1e-9 * (end - start) for start, end in last]
    return times


def timers() -> dict[str, Timer]:
    """The timers that can run here: events always, CUPTI where cupti-python is installed."""
    found: dict[str, Timer] = {"graph": by_events}
    try:
        from cupti import cupti  # noqa: F401
    except Exception as error:
        print(f"no timer cupti: {error}")
    else:
        found["cupti"] = by_cupti
    return found
