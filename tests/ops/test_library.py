"""The promises of `torch.library`: schema, fake, gradient, compilation, no synchronisation."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hivtp_kernels import (
    PruneConfig,
    attention_scores,
    backends,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)
from hivtp_kernels.testing import random_qk
from hivtp_kernels.types import Attention, SelectParams

CONFIG = PruneConfig(grid=(6, 7))
OPS = torch.ops.hivtp


@pytest.fixture(autouse=True)
def poison():
    """Nothing is poisoned here: the compiler calls torch.empty as well."""


@pytest.fixture
def kept():
    return select_tokens(torch.randn(2, 42), CONFIG, backend="torch")


def test_schemas_take_the_fields_in_their_order():
    attention, params = Attention._fields, SelectParams._fields
    for op, expected in (
        (OPS.attention_scores, (*attention, "backend")),
        (OPS.select_tokens, ("scores", *params, "backend")),
        (OPS.score_and_select, (*attention, *params, "backend")),
    ):
        assert tuple(a.name for a in op.default._schema.arguments) == expected


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_opcheck_score(rows, backend):
    q, k = random_qk(2, 2, 2, 43, 16)
    arguments = (q, k, [], rows, 1, 0.25)
    opcheck(OPS.attention_scores.default, (*arguments, backend))
    opcheck(OPS.score_and_select.default, (*arguments, *CONFIG.params, backend))


def test_opcheck_select(backend):
    opcheck(OPS.select_tokens.default, (torch.randn(2, 42), *CONFIG.params, backend))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_gather(requires_grad, kept, backend):
    x = torch.randn(2, 43, 8, requires_grad=requires_grad)
    opcheck(OPS.gather_tokens.default, (x, kept.indices, 1, backend))
    cu_seqlens = torch.nn.functional.pad(kept.counts.cumsum(0, dtype=torch.int32), (1, 0))
    total = int(cu_seqlens[-1])
    opcheck(OPS.pack_tokens.default, (x, kept.indices, cu_seqlens, total, 1, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_and_once(compiler, backend):
    def prune(q, k, x):
        scores = attention_scores(q, k, rows="all", backend=backend)
        kept = select_tokens(scores, CONFIG, backend=backend)
        fused = score_and_select(q, k, CONFIG, backend=backend)
        return gather_tokens(x, kept, backend=backend), fused, scores

    torch._dynamo.reset()
    compiled = torch.compile(prune, fullgraph=True, backend=compiler)
    counts = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            q, k = random_qk(2, 2, 2, 43, 16, spread=1 + 3 * seed, seed=seed)
            x = torch.randn(2, 43, 8)
            got, fused, scores = compiled(q, k, x)
            counts.update(fused.counts.tolist())
            expected, expected_fused, expected_scores = prune(q, k, x)
            torch.testing.assert_close(scores, expected_scores)
            assert torch.equal(got, expected)
            assert torch.equal(fused.indices, expected_fused.indices)
    assert len(counts) > 1


def test_pack_compiles_whole(kept, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: pack_tokens(x, kept, backend=backend), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 43, 8)
    for got, expected in zip(compiled(x), pack_tokens(x, kept, backend=backend), strict=True):
        assert torch.equal(got, expected)


def test_gradient_flows_through_compiled_code(kept, backend):
    torch._dynamo.reset()
    x = torch.randn(2, 43, 8, requires_grad=True)

    def loss(x):
        return gather_tokens(x, kept, backend=backend).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(got, expected)


class Trace(TorchDispatchMode):
    """Record the names of all torch operations that a backend calls."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_but_pack_synchronises(kept, backend):
    """Operations whose result the host reads would wait for a device."""
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_to_copy", "lift_fresh"}
    run = backends.load(backend)
    q, k = random_qk(2, 2, 2, 43, 16)
    params = PruneConfig(grid=(6, 7), budget=20).params
    for rows in ("cls", "all"):
        attention = Attention(q, k, [], rows, 1, 0.25)
        with Trace() as trace:
            scores = run.attention_scores(attention)
            run.select_tokens(scores, params)
            run.score_and_select(attention, params)
            run.gather_tokens(torch.randn(2, 43, 8), kept.indices, 1)
        copies = {"_to_copy"} if backend == "torch" else set()
        assert not trace.names & (waits - copies)
    with Trace() as trace:
        pack_tokens(torch.randn(2, 43, 8), kept, backend=backend)
    assert "_local_scalar_dense" in trace.names
