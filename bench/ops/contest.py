"""Rounds of contestants with different numbers of threads and of calls per sample."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Contestant(NamedTuple):
    """`run` on `threads` threads; a sample is the mean of `calls` calls, for short ones."""

    run: Callable[[], object]
    threads: int = 1
    calls: int = 1


Samples = dict[str, list[float]]


def rounds(
    contestants: Mapping[str, Contestant],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Seconds per call of each contestant in each round; every other round runs in reverse order.

    A warm-up call precedes each sample. It wakes threads that the previous contestant did not use,
    and fills the caches.
    """
    seconds: Samples = {name: [] for name in contestants}
    before = torch.get_num_threads()
    try:
        for turn in range(count):
            for name in list(contestants)[:: -1 if turn % 2 else 1]:
                run, threads, calls = contestants[name]
                torch.set_num_threads(threads)
                run()
                start = clock()
                for _ in range(calls):
                    run()
                seconds[name].append((clock() - start) / calls)
    finally:
        torch.set_num_threads(before)
    return seconds


def each_thread_count(
    name: str, run: Callable[[], object], threads: int, calls: int = 1
) -> dict[str, Contestant]:
    """`run` on one thread and on all: torch's threads may thrash and be slower than one."""
    return {f"{name}, {n} threads": Contestant(run, n, calls) for n in sorted({1, threads})}


def median(samples: Samples, prefix: str) -> float:
    """The lowest median among contestants whose names start with `prefix`."""
    return min(statistics.median(s) for name, s in samples.items() if name.startswith(prefix))


def best(samples: Samples, prefix: str) -> float:
    """The best round among contestants whose names start with `prefix`: the machine's limit."""
    return min(min(s) for name, s in samples.items() if name.startswith(prefix))
