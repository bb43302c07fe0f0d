"""The cuda and triton backends on a GPU: `pytest tests/gpu`, or `tests/gpu/run` for everything.

Compares compiled code with the torch backend: values, bits, streams, threads, CUDA graphs. With
`HIVTP_REQUIRE_BACKENDS=cuda,triton` a missing backend fails. `HIVTP_REHEARSE=1` runs the same tests
on the CPU at tiny sizes: Triton's interpreter, emulated CUDA kernels, stand-ins for streams and
graphs.
"""

import copy
import os
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from helpers import emulate
from rehearsal import DEVICE, REHEARSE, attention, pick, same

pytestmark = pytest.mark.skipif(
    not (REHEARSE or torch.cuda.is_available()), reason="needs a CUDA device"
)

from hivtp_kernels import (
    PruneConfig,
    attention_scores,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)
from hivtp_kernels._extension import extension
from hivtp_kernels.backends import _native, load
from hivtp_kernels.testing import TOLERANCE

# torch's own: conftest.py replaces it with one that fills its result, which launches a kernel.
EMPTY = torch.empty
CONFIGS = pick(
    [
        PruneConfig(),
        PruneConfig(budget=192),
        PruneConfig(regions=(5, 7), window=(5, 3), ratio=0.4),
        PruneConfig(regions=(24, 24), window=(1, 1)),
        PruneConfig(grid=(10, 40), regions=(3, 4), budget=200),
        PruneConfig(grid=(64, 64)),
        PruneConfig(grid=(64, 64), regions=(7, 5), budget=1111),
    ],
    [PruneConfig((6, 7)), PruneConfig((6, 7), (5, 7), window=(3, 2), budget=17)],
)
SHAPES = pick(
    [(3, 4, 577, 64), (1, 2, 101, 8), (2, 3, 730, 72), (1, 2, 4101, 128)], [(2, 2, 43, 72)]
)
SIDE = pick(24, 6)
BUDGET = PruneConfig((SIDE, SIDE), budget=SIDE * SIDE // 3)


@pytest.fixture(scope="module", autouse=True)
def report():
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    print(f"\n{name}, sm_{capability[0]}{capability[1]}")
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}")


@pytest.fixture(params=["cuda", "triton"])
def backend(request, monkeypatch):
    if REHEARSE and request.param == "cuda":
        built = request.getfixturevalue("emulator")
        assert not isinstance(built, str), built
        emulate(monkeypatch, built)
    need(request.param)
    return request.param


def need(backend, rows=None):
    reason = load(backend).unavailable(torch.device(DEVICE), rows)
    required = os.environ.get("HIVTP_REQUIRE_BACKENDS", "").split(",")
    if reason is not None and backend in required and rows is None:
        pytest.fail(f"backend {backend} is required: {reason}")
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


def inputs(
    batch=3, heads=4, tokens=SIDE * SIDE + 1, head_dim=64, dtype=torch.float16, layers=3, seed=0
):
    return attention(batch, heads, tokens, head_dim, layers, dtype, seed)


def features(channels=64):
    return torch.randn(3, SIDE * SIDE + 1, channels, device=DEVICE)


def prune(q, k, x, rows, backend):
    selection = score_and_select(q, k, BUDGET, rows=rows, backend=backend)
    return *selection[:3], gather_tokens(x, selection, backend=backend)


def run_alone(code):
    """Run code in a fresh process; in a rehearsal here, where the stand-ins are."""
    if REHEARSE:
        exec(code, {})
    else:
        subprocess.run([sys.executable, "-c", code], check=True)


def scores_in_fp64(q, k, rows, prefix):
    total = 0
    for queries, keys in zip(q, k, strict=True):
        queries = queries[:, :, :1] if rows == "cls" else queries
        logits = queries.double() @ keys.double().mT * keys.shape[3] ** -0.5
        total = total + logits.softmax(-1).mean((1, 2))
    return total[:, prefix:] / len(q)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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
    batch = pick(16, 2)
    q, k = inputs(batch=batch, heads=pick(16, 2))
    together = attention_scores(q, k, rows=rows, backend=backend)
    for _ in range(pick(1000, 2)):
        assert torch.equal(together, attention_scores(q, k, rows=rows, backend=backend))
    for image in range(batch):
        alone = [[t[image, None].contiguous() for t in tensors] for tensors in (q, k)]
        scores = attention_scores(*alone, rows=rows, backend=backend)
        assert torch.equal(together[image, None], scores)
    shifted = [
        [torch.nn.functional.pad(t, (3, 5))[..., 3:-5] for t in tensors] for tensors in (q, k)
    ]
    assert torch.equal(together, attention_scores(*shifted, rows=rows, backend=backend))
    # One layer with other strides than the rest.
    q[1] = q[1].contiguous()
    assert torch.equal(together, attention_scores(q, k, rows=rows, backend=backend))


def difficult_scores(batch, patches):
    """Distinct scores, many ties, and every special value."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    distinct = torch.randn(batch, patches, generator=generator, device=DEVICE)
    special = distinct.round()
    special[:, ::7], special[:, 1::7] = float("nan"), float("-inf")
    special[:, 2::7], special[:, 3::7] = -0.0, 0.0
    special[:, 4::7] *= 1e-42
    return distinct, distinct.round(decimals=1), special


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_selection(config, backend):
    for scores in difficult_scores(8, config.grid[0] * config.grid[1]):
        selection = select_tokens(scores, config, backend=backend)
        expected = select_tokens(scores.cpu(), config, backend="torch")
        assert same(selection[:3], expected[:3])


def random_configs(count, seed):
    """Budgets, ratios, odd grids, ragged regions and windows."""
    draw = random.Random(seed)
    for number in range(count):
        height, width = (draw.randrange(2, pick(40, 9)) for _ in "hw")
        regions = draw.randrange(1, height + 1), draw.randrange(1, width + 1)
        window = draw.randrange(1, height + 1), draw.randrange(1, width + 1)
        windows = -(-height // window[0]) * -(-width // window[1])
        budget = draw.randrange(windows, height * width + 1) if number % 4 else None
        ratio = None if budget else draw.random()
        yield PruneConfig((height, width), regions, window=window, budget=budget, ratio=ratio)


@pytest.mark.parametrize("part", range(8))
def test_random_configs(part, backend):
    for config in random_configs(pick(16, 1), seed=part):
        patches = config.grid[0] * config.grid[1]
        for scores in difficult_scores(2, patches):
            selection = select_tokens(scores, config, backend=backend)
            expected = select_tokens(scores.cpu(), config, backend="torch")
            assert same(selection[:3], expected[:3]), config


@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fused_is_score_then_select(config, rows, backend):
    need(backend, rows)
    q, k = inputs(batch=5, tokens=config.grid[0] * config.grid[1] + 1)
    fused = score_and_select(q, k, config, rows=rows, backend=backend)
    scores = attention_scores(q, k, rows=rows, backend=backend)
    expected = select_tokens(scores.cpu(), config, backend="torch")
    assert same(fused[:3], expected[:3])


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [3, 64, pick(1024, 65)])
def test_gather_and_pack(channels, dtype, backend):
    config = PruneConfig((SIDE, SIDE))
    selection = select_tokens(torch.randn(3, SIDE * SIDE, device=DEVICE), config)
    x = features(channels + 1).to(dtype)
    for view in (x[..., :channels].contiguous(), x[..., 1:]):
        gathered = gather_tokens(view, selection, backend=backend)
        assert torch.equal(gathered, gather_tokens(view, selection, backend="torch"))
        packed, _ = pack_tokens(view, selection, backend=backend)
        assert torch.equal(packed, pack_tokens(view, selection, backend="torch")[0])


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_side_stream(rows, backend):
    need(backend, rows)
    q, k = inputs()
    x = features()
    expected = prune(q, k, x, rows, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The clones finish late here: a launch on another stream would read them too early.
        torch.cuda._sleep(50_000_000)
        late = [[t.clone() for t in tensors] for tensors in (q, k)]
        results = prune(*late, x, rows, backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert same(results, expected)


def in_threads(count, work):
    """Run `work(number)` in `count` threads at once; an error in any is raised here."""
    errors = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_a_thread_that_has_not_used_cuda(rows, backend, monkeypatch):
    """It has no current context: all memory comes from torch's cache, without a CUDA call."""
    need(backend, rows)
    monkeypatch.setattr(torch, "empty", EMPTY)
    q, k = inputs()
    x = features()
    expected = prune(q, k, x, rows, backend)
    del expected  # its memory goes to the cache
    results = []
    in_threads(1, lambda _: results.extend(prune(q, k, x, rows, backend)))
    assert same(results, prune(q, k, x, rows, backend))


def test_threads(backend):
    q, k = inputs()
    x = features()
    expected = prune(q, k, x, "cls", backend)
    torch.cuda.synchronize()

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(pick(50, 2)):
                assert same(prune(q, k, x, "cls", backend), expected)

    # Triton's interpreter keeps the program that runs in a global variable.
    in_threads(pick(8, 1 if backend == "triton" else 2), work)


def test_pickled_and_copied(backend):
    scores = torch.randn(3, SIDE * SIDE, device=DEVICE)
    selection = select_tokens(scores, BUDGET, backend=backend)
    x = features()
    expected = gather_tokens(x, selection, backend=backend)
    again, config = pickle.loads(pickle.dumps((selection, BUDGET)))
    for other in (again, copy.deepcopy(selection), select_tokens(scores, config, backend=backend)):
        assert torch.equal(gather_tokens(x, other, backend=backend), expected)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_cuda_is_captured_on_the_first_call(rows):
    """In a fresh process, so that the kernels are loaded during the capture."""
    name = pick("cuda", "cpu")
    need(name, rows)
    run_alone(
        "import torch\n"
        "from hivtp_kernels import PruneConfig, score_and_select\n"
        f"q, k = torch.randn(2, 1, 4, {SIDE * SIDE + 1}, 64, device={DEVICE!r}).unbind()\n"
        f"config = PruneConfig(({SIDE}, {SIDE}))\n"
        "graph = torch.cuda.CUDAGraph()\n"
        "with torch.cuda.graph(graph):\n"
        f"    kept = score_and_select(q, k, config, rows={rows!r}, backend={name!r})\n"
        "graph.replay()\n"
        f"again = score_and_select(q, k, config, rows={rows!r}, backend={name!r})\n"
        "assert torch.equal(kept.indices, again.indices)\n"
    )


def test_triton_is_captured_with_a_new_budget():
    """One call compiles for all budgets, batches and layouts of the same padded sizes."""
    need("triton")
    config = PruneConfig((SIDE, SIDE), budget=SIDE * SIDE // 3 + 5, window=BUDGET.window)
    q, k = inputs()
    score_and_select(q, k, BUDGET, backend="triton")
    q, k = ([t[:1].contiguous() for t in tensors] for tensors in (q, k))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = score_and_select(q, k, config, backend="triton")
    graph.replay()
    assert same(kept[:3], score_and_select(q, k, config, backend="triton")[:3])


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_cuda_graph_with_new_inputs(rows, backend):
    need(backend, rows)
    q, k = inputs()
    x = features()
    prune(q, k, x, rows, backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = prune(q, k, x, rows, backend)
    for seed in range(1, pick(6, 2)):
        new_q, new_k = inputs(seed=seed)
        for static, new in zip((*q, *k), (*new_q, *new_k), strict=True):
            static.copy_(new)
        x.normal_()
        graph.replay()
        assert same(results, prune(q, k, x, rows, backend))


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_compiled(rows, backend):
    """Compiles as one graph, and does not recompile for other contents."""
    need(backend, rows)
    x = features()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            q, k = inputs(seed=seed)
            assert same(compiled(q, k, x, rows, backend), prune(q, k, x, rows, backend))
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_a_device_that_is_not_the_current_one(rows, backend):
    need(backend, rows)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    q, k = inputs()
    x = features()
    there = [[t.to("cuda:1") for t in tensors] for tensors in (q, k)]
    results = prune(*there, x.to("cuda:1"), rows, backend)
    with torch.cuda.device(1):
        expected = prune(*there, x.to("cuda:1"), rows, backend)
    for got, want in zip(results, expected, strict=True):
        assert got.device == torch.device("cuda:1")
        assert torch.equal(got, want)


def test_a_stream_or_context_of_another_device_is_an_error():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    need("cuda")
    x = torch.ones(1, 1, 4, device="cuda:0")
    stream = torch.cuda.Stream("cuda:1").cuda_stream
    C = extension()
    features = _native.features(C, x, 0)
    call = {"features": features, "indices": 64, "capacity": 1, "out": 64}  # refused, so never read
    with pytest.raises(RuntimeError, match="the stream must belong to the current CUDA context"):
        C.cuda_gather_tokens(**call, device=0, stream=stream)
    with pytest.raises(RuntimeError, match="it belongs to device 0, not device 1"):
        C.cuda_gather_tokens(**call, device=1, stream=0)


def test_no_synchronisation(backend):
    q, k = inputs()
    x = features()
    prune(q, k, x, "cls", backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prune(q, k, x, "cls", backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
