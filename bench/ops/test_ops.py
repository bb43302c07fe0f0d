"""`pytest bench --benchmark-only`: one group per op, with shapes and traffic in `extra_info`."""

from __future__ import annotations

import statistics

import pytest

from .cases import Case, cases

CASES = [case for group in cases(batches=(1,)) for case in group]


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c.op}-{c.shape}-{c.dtype}-{c.backend}".replace(" ", "") for c in CASES]
)
def test_op(case: Case, benchmark) -> None:  # type: ignore[no-untyped-def]
    assert case.check()
    benchmark.group = case.op
    benchmark.extra_info |= {
        "shape": case.shape, "dtype": case.dtype, "backend": case.backend, "bytes": case.bytes,
        "flops": case.flops,
    }  # fmt: skip
    benchmark(case.run)
    if benchmark.stats is not None:  # --benchmark-disable only runs it
        benchmark.extra_info["GB/s"] = (
            1e-9 * case.bytes / statistics.median(benchmark.stats.stats.data)
        )
