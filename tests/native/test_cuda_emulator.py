"""The emulator itself: what it reports, and that results do not depend on the block order."""

import subprocess

import pytest
import torch
from cuda_emulator import build

from hivtp_kernels import PruneConfig, attention_scores, score_and_select
from hivtp_kernels.backends import _native

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


def test_misuse_is_reported_by_name(backend, emulator):
    program = build.folder_of(emulator) / "misuse"
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert output.splitlines() == [
        "barrier_for_some: thread 0 waits at __syncthreads, which not all reach",
        "shuffle_for_some: thread 0 waits at __shfl_xor_sync, which not all reach",
        "shuffle_next_to_barrier: thread 0 waits at __syncthreads, which not all reach",
        "different_operations: the lanes of a warp are at different operations",
        "shuffle_of_half_a_warp: a shuffle of less than a warp, which the emulator lacks",
        "write_past_shared_memory: a write past the end of shared memory",
        "nothing_wrong",
        "unknown: no such kernel",
        "nothing_wrong: a grid of 0 blocks",
        "nothing_wrong: a block of 1056 threads",
        "nothing_wrong: a block of 40 threads",
        "nothing_wrong: 65537 bytes of shared memory",
    ]


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_bits_do_not_depend_on_the_order_of_blocks(rows, backend, monkeypatch):
    torch.manual_seed(0)
    q, k = ([torch.randn(2, 3, 145, 32) for _ in range(2)] for _ in range(2))
    config = PruneConfig(grid=(12, 12))
    expected = attention_scores(q, k, rows=rows, backend=backend)
    kept = score_and_select(q, k, config, rows=rows, backend=backend)
    for seed in range(5):
        monkeypatch.setenv("HIVTP_EMULATOR_SEED", str(seed))
        assert torch.equal(attention_scores(q, k, rows=rows, backend=backend), expected)
        again = score_and_select(q, k, config, rows=rows, backend=backend)
        assert torch.equal(again.indices, kept.indices)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_all_partial_sums_are_written_padding_included(rows, backend, monkeypatch):
    """70 patches are padded to 72; unwritten padding would be an error to initcheck."""
    spaces = []
    allocate = _native.workspace
    monkeypatch.setattr(_native, "workspace", lambda *a: spaces.append(allocate(*a)) or spaces[-1])
    q, k = torch.randn(2, 2, 3, 71, 32).unbind()
    attention_scores(q, k, rows=rows, backend=backend)
    # After two tickets, padded to 64 bytes.
    assert spaces[0].numel() == 64 + 2 * 3 * 72 * 4 + (rows == "all") * (2 * 3 * 71 * 4 + 24)
    partials = spaces[0][64:].view(torch.float32)[: 2 * 3 * 72]
    assert partials.isfinite().all()
