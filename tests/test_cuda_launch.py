"""csrc/cuda/launch.cpp over a driver that only writes down what is queued."""

import ctypes
import subprocess
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists(), reason="tests that lie beside an installed wheel"
)

DRIVER = """
#include <cstring>
#include <string>
#include "driver.h"
extern "C" {
char queue[4096];
int stream_status, queue_status;
}
static HivtpStatus add(const std::string& line) {
  std::strcat(queue, (line + "\\n").c_str());
  return HivtpStatus(queue_status);
}
namespace hivtp {
HivtpStatus check_stream(void*) { return HivtpStatus(stream_status); }
HivtpStatus launch(const Launch& l, void**, void*) {
  return add(l.kernel + (" " + std::to_string(l.grid[0] * l.grid[1] * l.grid[2])) + " blocks");
}
HivtpStatus zero(void*, size_t bytes, void*) { return add("zero " + std::to_string(bytes)); }
}
"""
STATUSES = (
    "OK BAD_ATTENTION_SHAPE BAD_DTYPE BAD_ROWS BAD_RULE BAD_GRID BAD_INDEX BAD_CU_SEQLENS BAD_SIZE"
    " NULL_POINTER MISALIGNED_WORKSPACE MISALIGNED_ROWS NO_DRIVER"
).split()
DATA = 1 << 20  # an address that nothing here reads
ALL, F32 = 1, 0


# The structs of api.h.
class View(Structure):
    _fields_ = [("data", c_void_p), *((f"{n}_stride", c_int64) for n in ("batch", "head", "token"))]


class Attention(Structure):
    _fields_ = [
        *((name, View * 8) for name in ("q", "k", "lse")),
        *((n, c_int32) for n in "layers batch heads tokens head_dim prefix dtype rows".split()),
        ("scale", c_float),
    ]


class Rule(Structure):
    _fields_ = [
        *((name, c_int32 * 2) for name in ("grid", "regions", "window")),
        ("quota_base", c_int32 * 4),
        ("quota_cut", c_int32 * 4),
        ("capacity", c_int32),
        ("fill", c_int32),
    ]


class Selection(Structure):
    _fields_ = [(name, c_void_p) for name in ("indices", "counts", "stage")]


class Features(Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("image_stride", "row_stride", "row_bytes")),
        *((name, c_int32) for name in ("batch", "patches", "prefix")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_launch")
    (folder / "driver.cpp").write_text(DRIVER)
    cuda = ROOT / "csrc" / "cuda"
    command = ["c++", "-shared", "-fPIC", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", f"-I{cuda}", "-o", folder / "launch.so"]
    subprocess.run([*command, cuda / "launch.cpp", folder / "driver.cpp"], check=True)
    return ctypes.CDLL(str(folder / "launch.so"))


@pytest.fixture
def call(library):
    """Call an entry point; returns its status by name, and what was queued."""

    def call(name, *arguments):
        queue = (ctypes.c_char * 4096).in_dll(library, "queue")
        queue.value = b""
        entry = getattr(library, f"hivtp_cuda_{name}")
        status = entry(*(byref(a) if isinstance(a, Structure) else a for a in arguments))
        return STATUSES[status], queue.value.decode().splitlines()

    for name in ("stream_status", "queue_status"):
        c_int32.in_dll(library, name).value = 0
    return call


def attention(lse=False, **changes):
    """Two layers of three images: four heads, 65 tokens, 1 of them prefix."""
    a = Attention(layers=2, batch=3, heads=4, tokens=65, head_dim=64, prefix=1, dtype=1, scale=1)
    for layer in range(2):
        a.q[layer] = a.k[layer] = View(DATA, 64 * 65 * 4, 64 * 65, 64)
        a.lse[layer] = View(DATA if lse else None, 65 * 4, 65, 1)
    for name, value in changes.items():
        setattr(a, name, value)
    return a


def rule(grid=(8, 8), capacity=32, window=(2, 2), base=4):
    return Rule(grid, (2, 2), window, (base,) * 4, (0,) * 4, capacity, 0)


def score(call, a, workspace=DATA, scores=DATA):
    return call("attention_scores", a, c_void_p(scores), c_void_p(workspace), c_void_p())


def fused(call, a, r, out=(DATA,) * 3, workspace=DATA):
    pointers = (c_void_p(workspace), c_void_p())
    return call("score_and_select", a, r, Selection(*out), *pointers)


def select(call, r, batch=3, scores=DATA, out=(DATA,) * 3):
    arguments = (c_void_p(scores), c_int64(64), c_int32(batch), r, Selection(*out), c_void_p())
    return call("select_tokens", *arguments)


def gather(call, x, indices=DATA, capacity=9, out=DATA):
    return call("gather_tokens", x, c_void_p(indices), c_int32(capacity), c_void_p(out), c_void_p())


def pack(call, x, cu_seqlens=DATA, total=20):
    arguments = (c_int32(9), c_void_p(cu_seqlens), c_int64(total), c_void_p(DATA), c_void_p())
    return call("pack_tokens", x, c_void_p(DATA), *arguments)


def features(**changes):
    x = Features(data=DATA, image_stride=8192, row_stride=128, row_bytes=128, batch=3, patches=64)
    for name, value in changes.items():
        setattr(x, name, value)
    return x


def test_what_is_queued(call):
    """One kernel for `cls`, two for `all` and one where lse is given, with or without selection."""
    tickets = "zero 12"
    for run in (score, lambda call, a: fused(call, a, rule())):
        assert run(call, attention()) == ("OK", [tickets, "hivtp_cls_f16 24 blocks"])
        assert run(call, attention(dtype=2)) == ("OK", [tickets, "hivtp_cls_bf16 24 blocks"])
        assert run(call, attention(dtype=F32, rows=ALL)) == (
            "OK",
            [tickets, "hivtp_lse_f32 48 blocks", "hivtp_columns_f32 48 blocks"],
        )
        with_lse = attention(lse=True, rows=ALL)
        assert run(call, with_lse) == ("OK", [tickets, "hivtp_columns_f16 48 blocks"])
    assert select(call, rule()) == ("OK", ["hivtp_select 3 blocks"])
    assert gather(call, features()) == ("OK", ["hivtp_gather 4 blocks"])
    assert pack(call, features()) == ("OK", ["hivtp_pack 4 blocks"])


def test_nothing_to_do(call):
    nothing = ("OK", [])
    assert score(call, attention(batch=0), workspace=None, scores=None) == nothing
    assert fused(call, attention(batch=0), rule(), out=(None,) * 3, workspace=None) == nothing
    assert select(call, rule(), batch=0, scores=None, out=(None,) * 3) == nothing
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
    *(({"layers": n}, "BAD_ATTENTION_SHAPE") for n in (0, 9)),
    *(({"heads": n}, "BAD_ATTENTION_SHAPE") for n in (0, -1)),
    *(({"tokens": n}, "BAD_ATTENTION_SHAPE") for n in (0, 4102)),
    *(({"head_dim": n}, "BAD_ATTENTION_SHAPE") for n in (0, 12, 136)),
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
    assert fused(call, a, rule()) == (status, [])


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


def test_strides_that_nothing_uses(call):
    """Of the one row of q for `cls`, and of a single image and head."""
    assert score(call, with_view("q", token_stride=63))[0] == "OK"
    one = with_view("k", batch_stride=3, head_stride=5)
    one.batch = one.heads = 1
    assert score(call, one)[0] == "OK"


def test_bad_pointers_and_rules(call):
    null, misaligned = "NULL_POINTER", "MISALIGNED_WORKSPACE"
    assert score(call, attention(), workspace=None) == (null, [])
    assert score(call, attention(), scores=None) == (null, [])
    assert score(call, attention(), workspace=DATA + 32) == (misaligned, [])
    assert fused(call, attention(), rule(), workspace=DATA + 32) == (misaligned, [])
    assert select(call, rule(), scores=None) == (null, [])
    for missing in range(3):
        out = [DATA] * 3
        out[missing] = None
        assert fused(call, attention(), rule(), out) == (null, [])
        assert select(call, rule(), out=out) == (null, [])
    assert fused(call, attention(), rule(grid=(8, 9), capacity=36)) == ("BAD_GRID", [])
    for bad in (
        rule(grid=(65, 64)),
        rule(capacity=31),
        rule(capacity=65),
        rule(window=(0, 2)),
        rule(base=17),
    ):
        assert fused(call, attention(), bad) == ("BAD_RULE", [])
        assert select(call, bad) == ("BAD_RULE", [])
    assert select(call, rule(), batch=-1) == ("BAD_SIZE", [])
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
    assert fused(call, attention(rows=ALL), rule()) == ("NO_DRIVER", [])
    assert select(call, rule()) == ("NO_DRIVER", [])
    assert gather(call, features()) == ("NO_DRIVER", [])
    assert pack(call, features()) == ("NO_DRIVER", [])


def test_the_first_failure_is_the_last_thing_queued(library, call):
    c_int32.in_dll(library, "queue_status").value = STATUSES.index("NO_DRIVER")
    assert fused(call, attention(rows=ALL), rule()) == ("NO_DRIVER", ["zero 12"])


def test_workspaces(library):
    """Tickets, partial sums, lse where it is not given and, fused, the scores; -1 if illegal."""
    scores = library.hivtp_cuda_scores_workspace_bytes
    both = library.hivtp_cuda_score_and_select_workspace_bytes
    scores.restype = both.restype = c_int64
    partials = 3 * 2 * 4 * 64 * 4
    lse = 3 * 2 * 4 * 65 * 4 + 32
    assert scores(byref(attention())) == 64 + partials
    assert scores(byref(attention(rows=ALL))) == 64 + partials + lse
    assert scores(byref(attention(rows=ALL, lse=True))) == 64 + partials
    assert both(byref(attention()), byref(rule())) == 64 + partials + 3 * 64 * 4
    assert scores(byref(attention(batch=0))) == 0
    assert scores(byref(attention(heads=0))) == both(byref(attention(heads=0)), byref(rule())) == -1
    assert both(byref(attention()), byref(rule(capacity=0))) == -1
