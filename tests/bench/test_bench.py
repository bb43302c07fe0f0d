"""Timing helpers, and the bench of the vision tower. No test asserts a time."""

import itertools

import pytest

from bench.models import cases, vision_tower
from bench.ops import timing


def test_rounds_alternate_their_order_and_the_first_does_not_count():
    calls, clock = [], itertools.count()
    contestants = [lambda: calls.append("a"), lambda: [calls.append("b"), next(clock)]]
    seconds = timing.rounds(contestants, 3, lambda: float(next(clock)))
    assert calls == list("baabbaab")
    assert seconds == [[1.0] * 3, [2.0] * 3]


def test_spread_and_ratio():
    assert timing.spread([0.003, 0.001, 0.010]) == "3.0 ms (1.0 to 10.0)"
    assert timing.paired_ratio([2.0, 3.0, 40.0], [1.0, 2.0, 10.0]) == 2.0


def test_a_busy_machine_is_reported(monkeypatch):
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (1.5, 0, 0))
    assert "1.50" in timing.load()
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (0.1, 9, 9))
    assert timing.load() is None


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_vision_tower(rows, capsys, monkeypatch):
    """Tiny towers with made-up times: three ticks pruned, two unpruned."""
    tiny = cases.TINY | {"image_size": 56}
    measured = {}

    def rounds(contestants, count):
        kept, whole = contestants[1](), contestants[0]()
        measured["shapes"] = whole.shape, kept.shape
        return [[2.0] * count, [3.0] * count]

    monkeypatch.setattr(timing, "rounds", rounds)
    ratio = vision_tower.main(["--rounds", "3", "--budget", "5", "--rows", rows], tiny)
    printed = capsys.readouterr().out
    assert ratio == 1.5 and "median of 3 paired rounds: 1.500" in printed
    assert measured["shapes"] == ((1, 16, 32), (1, 5, 32))
