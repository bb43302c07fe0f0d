"""Rounds of contestants that differ in their threads and in how many calls a sample is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Contestant(NamedTuple):
    """`run` on so many threads; a sample is the mean of so many calls, for those that are short."""

    run: Callable[[], object]
    threads: int = 1
    calls: int = 1


Samples = dict[str, list[float]]


def rounds(
    contestants: Mapping[str, Contestant],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Seconds a call of each contestant in each round, every other round backwards.

    Each sample follows a call that does not count: it pays for threads that the one before did not
    use, and leaves the caches as this contestant leaves them.
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
    """The same on one thread and on all: torch's may thrash, and more time goes by than on one."""
    return {f"{name}, {n} threads": Contestant(run, n, calls) for n in sorted({1, threads})}


def median(samples: Samples, prefix: str) -> float:
    """Least median of the contestants whose names begin so."""
    return min(statistics.median(s) for name, s in samples.items() if name.startswith(prefix))


def best(samples: Samples, prefix: str) -> float:
    """Best round of the contestants whose names begin so: what the machine can do."""
    return min(min(s) for name, s in samples.items() if name.startswith(prefix))
