"""csrc/cuda/launch.cpp over a driver that only records what is queued."""

from ctypes import byref, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest

from bench.ops import cuda_queue
from bench.ops.cuda_queue import Attention, Features, Selection, SelectParams, View
from hivtp_kernels.types import MAX_HEAD_DIM, MAX_LAYERS, MAX_PATCHES, MAX_TOKENS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists(), reason="tests next to an installed wheel"
)

STATUSES = (
    "OK BAD_ATTENTION_SHAPE BAD_DTYPE BAD_ROWS BAD_SELECT_PARAMS BAD_GRID BAD_INDEX BAD_CU_SEQLENS"
    " BAD_SIZE NULL_POINTER MISALIGNED_WORKSPACE MISALIGNED_ROWS NO_DRIVER"
).split()
DATA = 1 << 20  # an address that is never read
QUEUE = c_int32(0), c_void_p()  # a device and a stream
ALL, F32 = 1, 0


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return cuda_queue.build(tmp_path_factory.mktemp("cuda_launch"))


@pytest.fixture
def call(library):
    """Call an entry point; returns its status by name and what was queued."""

    def call(name, *arguments):
        status, lines = cuda_queue.queued(library, name, *arguments)
        return STATUSES[status], [line.split(",")[0] for line in lines]

    for name in ("stream_status", "queue_status"):
        c_int32.in_dll(library, name).value = 0
    return call


def attention(lse=False, **changes):
    """Two layers of three images with four heads and 65 tokens, one of them prefix."""
    a = Attention(layers=2, batch=3, heads=4, tokens=65, head_dim=64, prefix=1, dtype=1, scale=1)
    for layer in range(2):
        a.q[layer] = a.k[layer] = View(DATA, 64 * 65 * 4, 64 * 65, 64)
        a.lse[layer] = View(DATA if lse else None, 65 * 4, 65, 1)
    for name, value in changes.items():
        setattr(a, name, value)
    return a


def params(grid=(8, 8), capacity=32, window=(2, 2), base=4):
    return SelectParams(grid, (2, 2), window, (base,) * 4, (0,) * 4, capacity, 0)


def score(call, a, workspace=DATA, scores=DATA):
    return call("attention_scores", a, c_void_p(scores), c_void_p(workspace), *QUEUE)


def fused(call, a, p, out=(DATA,) * 3, workspace=DATA):
    pointers = (c_void_p(workspace), *QUEUE)
    return call("score_and_select", a, p, Selection(*out), *pointers)


def select(call, p, batch=3, scores=DATA, out=(DATA,) * 3):
    arguments = (c_void_p(scores), c_int64(64), c_int32(batch), p, Selection(*out), *QUEUE)
    return call("select_tokens", *arguments)


def gather(call, x, indices=DATA, capacity=9, out=DATA):
    return call("gather_tokens", x, c_void_p(indices), c_int32(capacity), c_void_p(out), *QUEUE)


def pack(call, x, cu_seqlens=DATA, total=20):
    arguments = (c_int32(9), c_void_p(cu_seqlens), c_int64(total), c_void_p(DATA), *QUEUE)
    return call("pack_tokens", x, c_void_p(DATA), *arguments)


def features(**changes):
    x = Features(data=DATA, image_stride=8192, row_stride=128, row_bytes=128, batch=3, patches=64)
    for name, value in changes.items():
        setattr(x, name, value)
    return x


def test_what_is_queued(call):
    """One kernel for `cls`, two for `all`, one if lse is given; the same with selection."""
    tickets = "zero 12"
    for run in (score, lambda call, a: fused(call, a, params())):
        assert run(call, attention()) == ("OK", [tickets, "hivtp_cls_f16 24 blocks"])
        assert run(call, attention(dtype=2)) == ("OK", [tickets, "hivtp_cls_bf16 24 blocks"])
        assert run(call, attention(dtype=F32, rows=ALL)) == (
            "OK",
            [tickets, "hivtp_lse_f32 48 blocks", "hivtp_columns_f32 48 blocks"],
        )
        with_lse = attention(lse=True, rows=ALL)
        assert run(call, with_lse) == ("OK", [tickets, "hivtp_columns_f16 48 blocks"])
    assert select(call, params()) == ("OK", ["hivtp_select 3 blocks"])
    assert gather(call, features()) == ("OK", ["hivtp_gather 4 blocks"])
    assert pack(call, features()) == ("OK", ["hivtp_pack 4 blocks"])


def test_nothing_to_do(call):
    nothing = ("OK", [])
    assert score(call, attention(batch=0), workspace=None, scores=None) == nothing
    assert fused(call, attention(batch=0), params(), out=(None,) * 3, workspace=None) == nothing
    assert select(call, params(), batch=0, scores=None, out=(None,) * 3) == nothing
    assert gather(call, features(batch=0, data=None), indices=None, out=None) == nothing
    assert gather(call, features(), capacity=0) == nothing
    assert gather(call, features(row_bytes=0)) == nothing
    assert pack(call, features(), total=0) == nothing


def with_view(name, layer=0, **changes):
    a = attention()
    for field, value in changes.items():
        setattr(getattr(a, name)[layer], field, value)
    return a


BAD_ATTENTION = [
    *(({"layers": n}, "BAD_ATTENTION_SHAPE") for n in (0, MAX_LAYERS + 1)),
    *(({"heads": n}, "BAD_ATTENTION_SHAPE") for n in (0, -1)),
    *(({"tokens": n}, "BAD_ATTENTION_SHAPE") for n in (0, MAX_TOKENS + 1)),
    *(({"head_dim": n}, "BAD_ATTENTION_SHAPE") for n in (0, 12, MAX_HEAD_DIM + 8)),
    *(({"prefix": n}, "BAD_ATTENTION_SHAPE") for n in (-1, 65)),
    ({"batch": -1}, "BAD_ATTENTION_SHAPE"),
    ({"dtype": 3}, "BAD_DTYPE"),
    ({"rows": 2}, "BAD_ROWS"),
    *(({"heads": h, "batch": b}, "BAD_SIZE") for h in (1 << 29, 1 << 30) for b in (2, 2**31 - 1)),
    ({"layers": 8, "heads": 2**31 - 1, "batch": 2**31 - 1}, "BAD_SIZE"),
]


@pytest.mark.parametrize(("changes", "status"), BAD_ATTENTION, ids=str)
def test_bad_attention(changes, status, call):
    a = attention(**changes)
    assert score(call, a) == (status, [])
    assert fused(call, a, params()) == (status, [])


@pytest.mark.parametrize(
    ("name", "layer", "changes", "status"),
    [
        ("q", 1, {"data": None}, "NULL_POINTER"),
        ("k", 0, {"data": None}, "NULL_POINTER"),
        ("lse", 1, {"data": DATA}, "NULL_POINTER"),
        *(
            (name, 1, {field: value}, "MISALIGNED_ROWS")
            for name in "qk"
            for field, value in (("data", DATA + 8), ("batch_stride", 4), ("head_stride", 12))
        ),
        ("k", 0, {"token_stride": 63}, "MISALIGNED_ROWS"),
    ],
)
def test_bad_views(name, layer, changes, status, call):
    assert score(call, with_view(name, layer, **changes)) == (status, [])


def test_unused_strides_may_be_anything(call):
    """From row to row of q for `cls`, which reads one row, and of a single image and head."""
    assert score(call, with_view("q", token_stride=63))[0] == "OK"
    one = with_view("k", batch_stride=3, head_stride=5)
    one.batch = one.heads = 1
    assert score(call, one)[0] == "OK"


def test_bad_pointers_and_params(call):
    null, misaligned = "NULL_POINTER", "MISALIGNED_WORKSPACE"
    assert score(call, attention(), workspace=None) == (null, [])
    assert score(call, attention(), scores=None) == (null, [])
    assert score(call, attention(), workspace=DATA + 32) == (misaligned, [])
    assert fused(call, attention(), params(), workspace=DATA + 32) == (misaligned, [])
    assert select(call, params(), scores=None) == (null, [])
    for missing in range(3):
        out = [DATA] * 3
        out[missing] = None
        assert fused(call, attention(), params(), out) == (null, [])
        assert select(call, params(), out=out) == (null, [])
    assert fused(call, attention(), params(grid=(8, 9), capacity=36)) == ("BAD_GRID", [])
    for bad in (
        params(grid=(1, MAX_PATCHES + 1)),
        params(capacity=31),
        params(capacity=65),
        params(window=(0, 2)),
        params(base=17),
    ):
        assert fused(call, attention(), bad) == ("BAD_SELECT_PARAMS", [])
        assert select(call, bad) == ("BAD_SELECT_PARAMS", [])
    assert select(call, params(), batch=-1) == ("BAD_SIZE", [])
    for run in (gather, pack):
        assert run(call, features(data=None)) == (null, [])
        for name in ("batch", "patches", "prefix", "row_bytes"):
            assert run(call, features(**{name: -1})) == ("BAD_SIZE", [])
    assert gather(call, features(), indices=None) == (null, [])
    assert gather(call, features(), out=None) == (null, [])
    assert pack(call, features(), cu_seqlens=None) == (null, [])
    assert pack(call, features(), total=-1) == ("BAD_SIZE", [])


def test_nothing_is_queued_without_a_driver(library, call):
    c_int32.in_dll(library, "stream_status").value = STATUSES.index("NO_DRIVER")
    assert score(call, attention()) == ("NO_DRIVER", [])
    assert fused(call, attention(rows=ALL), params()) == ("NO_DRIVER", [])
    assert select(call, params()) == ("NO_DRIVER", [])
    assert gather(call, features()) == ("NO_DRIVER", [])
    assert pack(call, features()) == ("NO_DRIVER", [])


def test_the_first_failure_is_the_last_thing_queued(library, call):
    c_int32.in_dll(library, "queue_status").value = STATUSES.index("NO_DRIVER")
    assert fused(call, attention(rows=ALL), params()) == ("NO_DRIVER", ["zero 12"])


def test_workspaces(library):
    """Tickets, partial sums, lse if not given, scores if fused; -1 for invalid arguments."""
    scores = library.hivtp_cuda_scores_workspace_bytes
    both = library.hivtp_cuda_score_and_select_workspace_bytes
    scores.restype = both.restype = c_int64
    partials = 3 * 2 * 4 * 64 * 4
    lse = 3 * 2 * 4 * 65 * 4 + 32
    assert scores(byref(attention())) == 64 + partials
    assert scores(byref(attention(rows=ALL))) == 64 + partials + lse
    assert scores(byref(attention(rows=ALL, lse=True))) == 64 + partials
    assert both(byref(attention()), byref(params())) == 64 + partials + 3 * 64 * 4
    assert scores(byref(attention(batch=0))) == 0
    assert (
        scores(byref(attention(heads=0))) == both(byref(attention(heads=0)), byref(params())) == -1
    )
    assert both(byref(attention()), byref(params(capacity=0))) == -1
