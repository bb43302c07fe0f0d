"""Timing on a shared machine: alternating rounds, medians, and a check of the load."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def rounds(
    contestants: Sequence[Callable[[], object]],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each contestant in each of `count` rounds, after a warm-up round.

    Every other round runs in reverse order, so that no contestant profits from its position.
    """
    seconds: list[list[float]] = [[] for _ in contestants]
    for turn in range(count + 1):
        order = range(len(contestants))
        for number in order if turn % 2 else reversed(order):
            start = clock()
            contestants[number]()
            if turn:
                seconds[number].append(clock() - start)
    return seconds


def spread(seconds: Sequence[float]) -> str:
    """Median and range, in milliseconds."""
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:.1f} ms ({low:.1f} to {high:.1f})"


def paired_ratio(seconds: Sequence[float], of: Sequence[float]) -> float:
    """Median of the ratios within a round, in which drifts of the machine cancel."""
    return statistics.median(a / b for a, b in zip(seconds, of, strict=True))


def load() -> str | None:
    """Why a measurement would be unreliable now, or None."""
    busy = os.getloadavg()[0]
    return None if busy < 0.3 else f"busy: load average {busy:.2f}; ratios may still mean something"


def machine() -> str:
    """The machine and the torch version that the figures come from."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"
