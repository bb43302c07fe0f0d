"""What only the C++ kernels promise: bits, threads, forks, statuses, every instruction set."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from test_gather_tokens import selection

from hivtp_kernels import (
    PruneConfig,
    _extension,
    attention_scores,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)
from hivtp_kernels.backends import _native, load
from hivtp_kernels.testing import random_qk
from hivtp_kernels.types import MAX_HEAD_DIM, MAX_LAYERS, MAX_PATCHES, MAX_TOKENS

pytestmark = pytest.mark.parametrize("backend", ["cpu"], indirect=True)

OPS = Path(__file__).parents[1] / "ops"
ROWS = ["cls", "all"]
CONFIG = PruneConfig(grid=(10, 30), regions=(2, 3), budget=120)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def everything(batch, seed=0):
    """Results of all ops, with enough work for several threads, as one flat list of tensors."""
    q, k = random_qk(2, batch, 4, 301, 64, torch.bfloat16, seed=seed)
    scores = [attention_scores(q, k, rows=rows, backend="cpu") for rows in ROWS]
    kept = [select_tokens(s, CONFIG, backend="cpu") for s in scores]
    kept += [score_and_select(q, k, CONFIG, rows=rows, backend="cpu") for rows in ROWS]
    x = k[0].transpose(1, 2).flatten(2).repeat(1, 1, 8)
    copied = [gather_tokens(x, s, backend="cpu") for s in kept[:1]]
    copied += [pack_tokens(x, s, backend="cpu")[0] for s in kept[:1]]
    return [*scores, *(t for s in kept for t in s[:3]), *copied]


def assert_same_bits(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


def test_bits_do_not_depend_on_threads(backend):
    with threads(1):
        expected = everything(16)
    for count in (1, 2, 7, 7, 3):
        with threads(count):
            assert_same_bits(everything(16), expected)


@pytest.mark.parametrize("width", [1, 600, 40_000])
def test_rows_of_an_image_are_copied_by_several_threads(width, backend):
    """Narrow and wide rows, and more than the caches hold; with gaps; then a wrong last index."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(2, 1 + 300, width, generator=generator)
    indices = torch.randint(-1, 300, (2, 150), generator=generator, dtype=torch.int32)
    indices[torch.rand(2, 150, generator=generator) < 0.2] = -1
    kept = indices >= 0
    rows = x[torch.arange(2)[:, None], indices.long() + 1]
    rows[~kept] = 0
    counts = kept.sum(dim=1, dtype=torch.int32)
    chosen = select_tokens(torch.zeros(2, 300), CONFIG)._replace(indices=indices, counts=counts)
    for count in (1, 2, 7):
        with threads(count):
            assert torch.equal(gather_tokens(x, chosen, backend=backend), rows)
            assert torch.equal(pack_tokens(x, chosen, backend=backend)[0], rows[kept])
            one = chosen._replace(indices=indices[:1], counts=counts[:1])
            assert torch.equal(gather_tokens(x[:1], one, backend=backend), rows[:1])
            assert torch.equal(pack_tokens(x[:1], one, backend=backend)[0], rows[0][kept[0]])
    indices[1, -1] = 300
    with threads(7):
        for op in (gather_tokens, pack_tokens):
            with pytest.raises(ValueError, match="indices must be from -1 to patches - 1"):
                op(x, chosen, backend=backend)


@pytest.mark.parametrize("rows", ROWS)
def test_bits_do_not_depend_on_batch_mates_and_threads_together(rows, backend):
    q, k = random_qk(3, 9, 4, 301, 64, torch.float16)
    with threads(7):
        together = attention_scores(q, k, rows=rows, backend=backend)
    for image in (0, 4, 8):
        alone = [[t[image, None] for t in tensors] for tensors in (q, k)]
        with threads(1):
            assert torch.equal(
                attention_scores(*alone, rows=rows, backend=backend)[0], together[image]
            )


def test_concurrent_calls(backend):
    cases = [random_qk(2, 6, 4, 201, 64, seed=seed) for seed in range(4)]
    expected = [attention_scores(q, k, rows="all", backend=backend) for q, k in cases]
    start = threading.Barrier(len(cases))
    equal = [0] * len(cases)

    def work(case):
        torch.set_num_threads(3)  # torch stores this number per thread
        start.wait()
        for _ in range(50):
            scores = attention_scores(*cases[case], rows="all", backend=backend)
            equal[case] += torch.equal(scores, expected[case])

    workers = [threading.Thread(target=work, args=(case,)) for case in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert equal == [50] * len(cases)


def run(code):
    """Run `code` in a new interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_a_forked_child_has_its_own_threads(backend):
    # Only our ops run in the child: torch's multithreaded ops hang after a fork.
    run(
        "import os, sys, torch\n"
        "from hivtp_kernels import attention_scores\n"
        "from hivtp_kernels.testing import random_qk\n"
        "torch.set_num_threads(4)\n"
        "q, k = random_qk(2, 8, 4, 301, 64)\n"
        "expected = attention_scores(q, k, rows='all', backend='cpu').tolist()\n"
        "for _ in range(3):\n"
        "    child = os.fork()\n"
        "    scores = attention_scores(q, k, rows='all', backend='cpu').tolist()\n"
        "    if child == 0:\n"
        "        threads = len(os.listdir('/proc/self/task'))\n"
        "        os._exit(7 if scores == expected and threads == 4 else 1)\n"
        "    assert scores == expected\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
    )


def test_torch_keeps_its_threads(backend):
    # libgomp ends the threads that a team smaller than torch's leaves out.
    run(
        "import os, torch\n"
        "from hivtp_kernels import PruneConfig, gather_tokens, select_tokens\n"
        "torch.set_num_threads(6)\n"
        "x, many = torch.rand(1, 577, 1024), torch.rand(1 << 20)\n"
        "config = PruneConfig(grid=(24, 24), budget=128)  # 512 KiB are worth two threads\n"
        "kept = select_tokens(torch.rand(1, 576), config, backend='cpu')\n"
        "seen = set()\n"
        "for _ in range(3):\n"
        "    gather_tokens(x, kept, backend='cpu')\n"
        "    many.exp()\n"
        "    seen.add(tuple(sorted(os.listdir('/proc/self/task'))))\n"
        "assert len(seen) == 1, seen\n"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_every_16_bit_float_is_widened_exactly(rows, dtype, backend):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    k = every[every.isfinite()].view(-1, 1, 32, 8)
    q = torch.full_like(k, 2.0**-11)
    for factor in (1, 2.0**20):
        narrow, wide = (
            attention_scores(q.to(t), k.to(t), rows=rows, prefix=1, scale=factor, backend=backend)
            for t in (dtype, torch.float32)
        )
        assert torch.equal(narrow.nan_to_num(-1), wide.nan_to_num(-1))


def exponentials(x):
    """exp(x) as the kernels compute it: the weight of a logit x with an lse of 0."""
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1
    k = torch.zeros(1, 1, len(x) + 1, 8)
    k[0, 0, 1:, 0] = x
    return attention_scores(q, k, scale=1.0, lse=torch.zeros(1, 1, 1), backend="cpu")[0]


def test_exp(backend):
    x = torch.cat([torch.linspace(-86.5, 88.7, 4000), torch.tensor([0.0, -0.0, 1e-30, 88.7228])])
    expected = x.double().exp()
    ulp = torch.from_numpy(np.spacing(expected.float().numpy())).double()
    assert ((exponentials(x).double() - expected) / ulp).abs().max() < 2
    inf = float("inf")
    assert exponentials(torch.tensor([-inf, -1e30, -104.0])).tolist() == [0, 0, 0]
    assert exponentials(torch.tensor([inf, 1e30, 89.0])).tolist() == [inf, inf, inf]
    assert exponentials(torch.tensor([float("nan")])).isnan().all()


def test_the_longest_sequence_over_all_rows(backend):
    q, k = random_qk(1, 1, 1, MAX_TOKENS, 8)
    scores = attention_scores(q, k, rows="all", prefix=5, backend=backend)
    expected = oracle.attention_scores(q, k, 8**-0.5, "all", 5)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-6)


@pytest.mark.parametrize("target", ["x86_64_v3", "baseline"])
def test_every_older_instruction_set(target, backend):
    """Run the op suite in a process that may use only this instruction set."""
    env = os.environ | {"HIVTP_CPU_TARGET": target, "OMP_NUM_THREADS": "1"}
    code = "import hivtp_kernels._C as c; print(c.cpu_target)"
    used = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if used.stdout.strip() != target:
        pytest.skip(reason=f"this machine has no {target}")
    files = [OPS / "test_select_tokens.py", OPS / "test_attention_scores.py", __file__]
    only = ["-k", "cpu and not older_instruction_set"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *only, *files],
        env=env,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


# ---- statuses ----


@pytest.mark.parametrize("wrong", [42, -2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("op", [gather_tokens, pack_tokens])
def test_an_index_out_of_range_is_an_error(op, wrong, backend):
    kept = selection(3)
    kept.indices[1, 2] = wrong
    with pytest.raises(ValueError, match="indices must be from -1 to patches - 1"):
        op(torch.randn(3, 43, 8), kept, backend=backend)


def test_cu_seqlens_that_differ_from_the_indices_are_an_error(backend):
    kept = selection(2)
    x = torch.randn(2, 43, 8)
    cu_seqlens = torch.tensor([0, *kept.counts.cumsum(0).tolist()], dtype=torch.int32)
    total = int(cu_seqlens[-1])
    pack = load("cpu").pack_tokens
    assert pack(x, kept.indices, cu_seqlens, total, 1).shape == (total, 8)
    for wrong in ([0, 0, total], [1, 5, total], [0, total + 1, total], [0, 5, total - 1]):
        with pytest.raises(ValueError, match="pack_tokens: cu_seqlens must be the running sums"):
            pack(x, kept.indices, torch.tensor(wrong, dtype=torch.int32), total, 1)
    with pytest.raises(ValueError, match="cu_seqlens"):
        pack(x, kept.indices[:, :0], cu_seqlens, total, 1)


def params(**changes):
    values = dict(grid=(4, 6), regions=(2, 2), window=(2, 2), quota_base=(1, 0, 0, 0))
    values |= dict(quota_cut=(0, 0, 0, 0), capacity=10, fill=False)
    return _extension.extension().SelectParams(**(values | changes))


def select(**changes):
    C = _extension.extension()
    values = dict(scores=64, image_stride=24, batch=1, params=params(), workspace=64, threads=1)
    values |= dict(selection=C.Selection(indices=64, counts=64, stage=64))
    C.select_tokens(**(values | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": (1, MAX_PATCHES + 1)},
        {"grid": (0, 6)},
        {"grid": (2**16, 2**16)},
        {"regions": (5, 2)},
        {"regions": (2, 0)},
        {"window": (0, 2)},
        {"quota_base": (7, 0, 0, 0)},
        {"quota_base": (-1, 0, 0, 0)},
        {"quota_cut": (1, 0, 0, 0)},
        {"capacity": 9},
        {"capacity": 25},
    ],
    ids=str,
)
def test_params_that_could_write_out_of_bounds_are_an_error(changes, backend):
    C = _extension.extension()
    assert C.select_tokens_workspace(params=params(), threads=1) > 0
    with pytest.raises(ValueError, match="no workspace for invalid arguments"):
        C.select_tokens_workspace(params=params(**changes), threads=1)
    with pytest.raises(ValueError, match="select_tokens: params must have"):
        select(scores=0, params=params(**changes), workspace=0)


def attention(**changes):
    view = (64, (0, 0, 0))
    values = dict(q=[view], k=[view], lse=[], batch=1, heads=2, tokens=25)
    values |= dict(head_dim=8, prefix=1, dtype=0, rows=0, scale=1.0)
    return _extension.extension().Attention(**(values | changes))


def score(**changes):
    values = dict(attention=attention(), scores=64, workspace=64, threads=1)
    _extension.extension().attention_scores(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads at least 1"),
        ({"tokens": MAX_TOKENS + 1}, f"tokens 1 to {MAX_TOKENS}"),
        ({"head_dim": 12}, "head_dim a multiple of 8"),
        ({"head_dim": MAX_HEAD_DIM + 8}, f"up to {MAX_HEAD_DIM}"),
        ({"prefix": 25}, "prefix less than tokens"),
        ({"prefix": -1}, "prefix less than tokens"),
        ({"dtype": 3}, "dtype must be"),
        ({"rows": 2}, "rows must be"),
    ],
)
def test_attention_out_of_range_is_an_error(changes, message, backend):
    with pytest.raises(ValueError, match=f"attention_scores: .*{message}"):
        score(attention=attention(**changes))


def test_other_statuses(backend):
    C = _extension.extension()
    view = (64, (0, 0, 0))
    many = [view] * (MAX_LAYERS + 1)
    with pytest.raises(ValueError, match=f"one view per layer, at most {MAX_LAYERS}"):
        attention(q=many, k=many)
    with pytest.raises(ValueError, match="one view per layer"):
        attention(q=[view] * 2)
    with pytest.raises(RuntimeError, match="attention_scores: the workspace must be aligned to 64"):
        score(workspace=65)
    for null in ("scores", "workspace"):
        with pytest.raises(RuntimeError, match="attention_scores: a pointer is null"):
            score(**{null: 0})
    with pytest.raises(ValueError, match="score_and_select: .* tokens - prefix patches"):
        C.score_and_select(
            attention=attention(tokens=26),
            params=params(),
            selection=C.Selection(indices=64, counts=64, stage=64),
            workspace=64,
            threads=1,
        )
    with pytest.raises(ValueError, match="select_tokens: sizes must not be negative"):
        select(batch=-1)
    x, indices = torch.rand(1, 577, 1024), torch.arange(128, dtype=torch.int32)[None]
    with pytest.raises(ValueError, match="gather_tokens: .* threads must be at least 1"):
        C.gather_tokens(
            **_native.source(C, x, indices, 1), out=torch.rand(128, 1024).data_ptr(), threads=0
        )
