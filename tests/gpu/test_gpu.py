"""The cuda and triton backends on a GPU: `pytest tests/gpu`. Needs nothing but the package.

Compiled code against the torch backend, batch mates, a side stream, a second device, CUDA graphs
with new inputs. With `HIVTP_REQUIRE_BACKENDS=cuda,triton` a backend that is missing fails. Memory
and races, for each of the tools memcheck, racecheck, initcheck and synccheck:

    compute-sanitizer --tool memcheck --error-exitcode 1 --kernel-regex kns=hivtp_
        python -m pytest tests/gpu -k "cuda and not run_batch_mates"
"""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

from hivtp_kernels import (
    PruneConfig,
    attention_scores,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)
from hivtp_kernels._extension import extension
from hivtp_kernels.backends import load

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CONFIGS = [
    PruneConfig(),
    PruneConfig(budget=192),
    PruneConfig(regions=(5, 7), window=(5, 3), ratio=0.4),
    PruneConfig(regions=(24, 24), window=(1, 1)),
    PruneConfig(grid=(10, 40), regions=(3, 4), budget=200),
    PruneConfig(grid=(64, 64)),
    PruneConfig(grid=(64, 64), regions=(7, 5), budget=1111),
]


@pytest.fixture(scope="module", autouse=True)
def report():
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    print(f"\n{name}, sm_{capability[0]}{capability[1]}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    need(request.param)
    return request.param


def need(backend, rows=None):
    reason = load(backend).unavailable(torch.device("cuda"), rows)
    required = os.environ.get("HIVTP_REQUIRE_BACKENDS", "").split(",")
    if reason is not None and backend in required and rows is None:
        pytest.fail(f"backend {backend} is required: {reason}")
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


def inputs(batch=3, heads=4, tokens=577, head_dim=64, dtype=torch.float16, layers=3, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (batch, tokens, heads, head_dim)
    return tuple(
        [
            torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2)
            for _ in range(layers)
        ]
        for _ in "qk"
    )


def scores_in_fp64(q, k, rows, prefix):
    total = 0
    for queries, keys in zip(q, k, strict=True):
        queries = queries[:, :, :1] if rows == "cls" else queries
        logits = queries.double() @ keys.double().mT * keys.shape[3] ** -0.5
        total = total + logits.softmax(-1).mean((1, 2))
    return total[:, prefix:] / len(q)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize(
    "shape", [(3, 4, 577, 64), (1, 2, 101, 8), (2, 3, 730, 72), (1, 2, 4101, 128)], ids=str
)
def test_scores(shape, rows, dtype, backend):
    need(backend, rows)
    q, k = inputs(*shape, dtype=dtype)
    expected = scores_in_fp64(q, k, rows, 1)
    scores = attention_scores(q, k, rows=rows, backend=backend)
    torch.testing.assert_close(scores.double(), expected, rtol=TOLERANCE[dtype], atol=0)
    lse = [
        (a.double() @ b.double().mT * shape[3] ** -0.5).logsumexp(-1).float()
        for a, b in zip(q, k, strict=True)
    ]
    scores = attention_scores(q, k, rows=rows, lse=lse, backend=backend)
    torch.testing.assert_close(scores.double(), expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_nan_and_infinity(rows, backend):
    need(backend, rows)
    q, k = inputs(head_dim=16)
    clean = attention_scores(q, k, rows=rows, backend=backend)
    k[1][0, 0, 7, 3] = float("nan")
    q[1][2, 0, 0, 3], k[1][2, 0, 7, 3] = 1, float("inf")
    scores = attention_scores(q, k, rows=rows, backend=backend)
    assert scores[[0, 2]].isnan().all()
    assert torch.equal(scores[1], clean[1])


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_bits_do_not_depend_on_run_batch_mates_or_layout(rows, backend):
    need(backend, rows)
    q, k = inputs(batch=16, heads=16)
    together = attention_scores(q, k, rows=rows, backend=backend)
    for _ in range(50):
        assert torch.equal(together, attention_scores(q, k, rows=rows, backend=backend))
    for image in range(16):
        alone = [[t[image, None].contiguous() for t in tensors] for tensors in (q, k)]
        scores = attention_scores(*alone, rows=rows, backend=backend)
        assert torch.equal(together[image, None], scores)
    shifted = [
        [torch.nn.functional.pad(t, (3, 5))[..., 3:-5] for t in tensors] for tensors in (q, k)
    ]
    assert torch.equal(together, attention_scores(*shifted, rows=rows, backend=backend))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_selection(config, backend):
    patches = config.grid[0] * config.grid[1]
    generator = torch.Generator("cuda").manual_seed(0)
    random = torch.randn(8, patches, generator=generator, device="cuda")
    special = random.round()
    special[:, ::7], special[:, 1::7] = float("nan"), float("-inf")
    special[:, 2::7], special[:, 3::7] = -0.0, 0.0
    special[:, 4::7] *= 1e-42
    for scores in (random, random.round(decimals=1), special):
        selection = select_tokens(scores, config, backend=backend)
        expected = select_tokens(scores.cpu(), config, backend="torch")
        for got, want in zip(selection[:3], expected[:3], strict=True):
            assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fused_is_score_then_select(config, rows, backend):
    need(backend, rows)
    q, k = inputs(batch=5, tokens=config.grid[0] * config.grid[1] + 1)
    fused = score_and_select(q, k, config, rows=rows, backend=backend)
    scores = attention_scores(q, k, rows=rows, backend=backend)
    expected = select_tokens(scores.cpu(), config, backend="torch")
    for got, want in zip(fused[:3], expected[:3], strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [3, 64, 1024])
def test_gather_and_pack(channels, dtype, backend):
    selection = select_tokens(torch.randn(3, 576, device="cuda"), PruneConfig())
    x = torch.randn(3, 577, channels, device="cuda").to(dtype)
    gathered = gather_tokens(x, selection, backend=backend)
    assert torch.equal(gathered, gather_tokens(x, selection, backend="torch"))
    packed, _ = pack_tokens(x, selection, backend=backend)
    assert torch.equal(packed, pack_tokens(x, selection, backend="torch")[0])


def prune(q, k, x, rows, backend):
    selection = score_and_select(q, k, PruneConfig(budget=192), rows=rows, backend=backend)
    return *selection[:3], gather_tokens(x, selection, backend=backend)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_side_stream(rows, backend):
    need(backend, rows)
    q, k = inputs()
    x = torch.randn(3, 577, 64, device="cuda")
    expected = prune(q, k, x, rows, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The clones are late on this stream, so that a launch on another one reads them too early.
        torch.cuda._sleep(50_000_000)
        late = [[t.clone() for t in tensors] for tensors in (q, k)]
        results = prune(*late, x, rows, backend)
    torch.cuda.current_stream().wait_stream(stream)
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_cuda_is_captured_without_a_call_before(rows):
    """In a process of its own, so that the kernels are loaded while the graph is captured."""
    need("cuda", rows)
    code = (
        "import torch\n"
        "from hivtp_kernels import PruneConfig, score_and_select\n"
        "q, k = torch.randn(2, 1, 4, 577, 64, device='cuda').unbind()\n"
        "config = PruneConfig()\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        f"    kept = score_and_select(q, k, config, rows={rows!r}, backend='cuda')\n"
        "graph.replay()\n"
        f"again = score_and_select(q, k, config, rows={rows!r}, backend='cuda')\n"
        "assert torch.equal(kept.indices, again.indices)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_cuda_graph_with_new_inputs(rows, backend):
    need(backend, rows)
    q, k = inputs()
    x = torch.randn(3, 577, 64, device="cuda")
    prune(q, k, x, rows, backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = prune(q, k, x, rows, backend)
    for seed in range(1, 6):
        new_q, new_k = inputs(seed=seed)
        for static, new in zip((*q, *k), (*new_q, *new_k), strict=True):
            static.copy_(new)
        x.normal_()
        graph.replay()
        for got, want in zip(results, prune(q, k, x, rows, backend), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_a_device_that_is_not_the_current_one(rows, backend):
    need(backend, rows)
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    q, k = inputs()
    x = torch.randn(3, 577, 64, device="cuda")
    there = [[t.to("cuda:1") for t in tensors] for tensors in (q, k)]
    results = prune(*there, x.to("cuda:1"), rows, backend)
    with torch.cuda.device(1):
        expected = prune(*there, x.to("cuda:1"), rows, backend)
    for got, want in zip(results, expected, strict=True):
        assert got.device == torch.device("cuda:1")
        assert torch.equal(got, want)


def test_a_stream_of_another_device_is_an_error():
    need("cuda")
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    torch.ones(1, device="cuda:0")
    stream = torch.cuda.Stream("cuda:1").cuda_stream
    with pytest.raises(RuntimeError, match="the stream must be of the current CUDA context"):
        extension().cuda_gather_tokens(64, 0, 0, 16, 1, 1, 0, 64, 1, 64, stream)


def test_no_synchronisation(backend):
    q, k = inputs()
    x = torch.randn(3, 577, 64, device="cuda")
    prune(q, k, x, "cls", backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prune(q, k, x, "cls", backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
