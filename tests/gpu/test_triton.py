"""The triton backend on a GPU: `pytest tests/gpu/test_triton.py`. Needs nothing but the package.

Compiled code against the torch backend, batch mates, a side stream, CUDA graphs with new inputs.
"""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
triton = pytest.importorskip("triton")

from hivtp_kernels import (
    PruneConfig,
    attention_scores,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)

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
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}")


def need(rows):
    if rows == "all" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("rows='all' needs compute capability 8.0")


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
def test_scores(shape, rows, dtype):
    need(rows)
    q, k = inputs(*shape, dtype=dtype)
    expected = scores_in_fp64(q, k, rows, 1)
    scores = attention_scores(q, k, rows=rows, backend="triton")
    torch.testing.assert_close(scores.double(), expected, rtol=TOLERANCE[dtype], atol=0)
    lse = [
        (a.double() @ b.double().mT * shape[3] ** -0.5).logsumexp(-1).float()
        for a, b in zip(q, k, strict=True)
    ]
    scores = attention_scores(q, k, rows=rows, lse=lse, backend="triton")
    torch.testing.assert_close(scores.double(), expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_nan_and_infinity(rows):
    need(rows)
    q, k = inputs(head_dim=16)
    clean = attention_scores(q, k, rows=rows, backend="triton")
    k[1][0, 0, 7, 3] = float("nan")
    q[1][2, 0, 0, 3], k[1][2, 0, 7, 3] = 1, float("inf")
    scores = attention_scores(q, k, rows=rows, backend="triton")
    assert scores[[0, 2]].isnan().all()
    assert torch.equal(scores[1], clean[1])


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_bits_do_not_depend_on_run_batch_mates_or_layout(rows):
    need(rows)
    q, k = inputs(batch=16, heads=16)
    together = attention_scores(q, k, rows=rows, backend="triton")
    for _ in range(50):
        assert torch.equal(together, attention_scores(q, k, rows=rows, backend="triton"))
    for image in range(16):
        alone = [[t[image, None].contiguous() for t in tensors] for tensors in (q, k)]
        scores = attention_scores(*alone, rows=rows, backend="triton")
        assert torch.equal(together[image, None], scores)
    shifted = [
        [torch.nn.functional.pad(t, (3, 5))[..., 3:-5] for t in tensors] for tensors in (q, k)
    ]
    assert torch.equal(together, attention_scores(*shifted, rows=rows, backend="triton"))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_selection(config):
    patches = config.grid[0] * config.grid[1]
    generator = torch.Generator("cuda").manual_seed(0)
    random = torch.randn(8, patches, generator=generator, device="cuda")
    special = random.round()
    special[:, ::7], special[:, 1::7] = float("nan"), float("-inf")
    special[:, 2::7], special[:, 3::7] = -0.0, 0.0
    special[:, 4::7] *= 1e-42
    for scores in (random, random.round(decimals=1), special):
        selection = select_tokens(scores, config, backend="triton")
        expected = select_tokens(scores.cpu(), config, backend="torch")
        for got, want in zip(selection[:3], expected[:3], strict=True):
            assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fused_is_score_then_select(config, rows):
    need(rows)
    q, k = inputs(batch=5, tokens=config.grid[0] * config.grid[1] + 1)
    fused = score_and_select(q, k, config, rows=rows, backend="triton")
    scores = attention_scores(q, k, rows=rows, backend="triton")
    expected = select_tokens(scores.cpu(), config, backend="torch")
    for got, want in zip(fused[:3], expected[:3], strict=True):
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [3, 64, 1024])
def test_gather_and_pack(channels, dtype):
    selection = select_tokens(torch.randn(3, 576, device="cuda"), PruneConfig())
    x = torch.randn(3, 577, channels, device="cuda").to(dtype)
    gathered = gather_tokens(x, selection, backend="triton")
    assert torch.equal(gathered, gather_tokens(x, selection, backend="torch"))
    packed, _ = pack_tokens(x, selection, backend="triton")
    assert torch.equal(packed, pack_tokens(x, selection, backend="torch")[0])


def prune(q, k, x, rows):
    selection = score_and_select(q, k, PruneConfig(budget=192), rows=rows, backend="triton")
    return *selection[:3], gather_tokens(x, selection, backend="triton")


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_side_stream(rows):
    need(rows)
    q, k = inputs()
    x = torch.randn(3, 577, 64, device="cuda")
    expected = prune(q, k, x, rows)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The clones are late on this stream, so that a launch on another one reads them too early.
        torch.cuda._sleep(50_000_000)
        late = [[t.clone() for t in tensors] for tensors in (q, k)]
        results = prune(*late, x, rows)
    torch.cuda.current_stream().wait_stream(stream)
    for got, want in zip(results, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_cuda_graph_with_new_inputs(rows):
    need(rows)
    q, k = inputs()
    x = torch.randn(3, 577, 64, device="cuda")
    prune(q, k, x, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = prune(q, k, x, rows)
    for seed in range(1, 6):
        new_q, new_k = inputs(seed=seed)
        for static, new in zip((*q, *k), (*new_q, *new_k), strict=True):
            static.copy_(new)
        x.normal_()
        graph.replay()
        for got, want in zip(results, prune(q, k, x, rows), strict=True):
            assert torch.equal(got, want)


def test_no_synchronisation():
    q, k = inputs()
    x = torch.randn(3, 577, 64, device="cuda")
    prune(q, k, x, "cls")
    torch.cuda.set_sync_debug_mode("error")
    try:
        prune(q, k, x, "cls")
    finally:
        torch.cuda.set_sync_debug_mode("default")
