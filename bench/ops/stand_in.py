"""Stand-ins for `torch.cuda` and CUPTI, to rehearse GPU code on the CPU.

`install()` replaces what tests and benches use. Tensors then live on the CPU, and times mean
nothing. `torch.cuda.is_available()` is not replaced, since the backends check it.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Ops that make the host wait for the device, which a CUDA graph does not allow.
_SYNCHRONIZING = ("aten::_local_scalar_dense", "aten::nonzero")


class Stream:
    """Runs everything immediately, in order."""

    cuda_stream, device_index = 0, 0
    device = torch.device("cpu")

    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def wait_stream(self, stream: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Event:
    """A timestamp of the host's clock."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._seconds - self._seconds)


class ActivityKind(enum.IntEnum):
    """Kinds of CUPTI's records."""

    MEMCPY, MEMSET, CONCURRENT_KERNEL = 1, 2, 10


class Cupti:
    """The functions of `cupti.cupti` that time kernels; `record` plays the device."""

    ActivityKind = ActivityKind

    def __init__(self) -> None:
        self.finalize()

    def finalize(self) -> None:
        self._kinds: set[int] = set()
        self._records: list[SimpleNamespace] = []

    def activity_enable(self, kind: int) -> None:
        self._kinds.add(kind)

    def activity_disable(self, kind: int) -> None:
        self._kinds.discard(kind)

    def activity_register_callbacks(
        self,
        requested: Callable[[], tuple[int, int]],
        completed: Callable[[Sequence[SimpleNamespace]], None],
    ) -> None:
        self._completed = completed

    def activity_flush_all(self, flag: int) -> None:
        self._completed(self._records)
        self._records = []

    def record(self, kind: int, **fields: int) -> None:
        if kind in self._kinds:
            self._records.append(SimpleNamespace(kind=kind, **fields))


cupti = Cupti()
_correlation_ids = itertools.count(1)


class _Recorder(TorchDispatchMode):
    """Records every op with its arguments and outputs, and refuses ops that synchronize."""

    def __init__(self, calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]]) -> None:
        super().__init__()
        self._calls = calls

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run during capture, as on a GPU."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name in _SYNCHRONIZING:
            raise RuntimeError(f"{func} synchronizes, which a CUDA graph does not allow")
        outputs = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, outputs))
        return outputs


class CUDAGraph:
    """Replays the dispatcher ops that ran during capture, on the same tensors.

    Code that bypasses the dispatcher, such as Inductor's C++, is not replayed.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        self._calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        self._calls.clear()

    def replay(self) -> None:
        start = time.perf_counter_ns()
        for func, args, kwargs, outputs in self._calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                # Views and in-place outputs share the recorded memory already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        launch, end = next(_correlation_ids), time.perf_counter_ns()
        cupti.record(
            ActivityKind.CONCURRENT_KERNEL, graph_id=1, correlation_id=launch, start=start, end=end
        )


_capturing = False


@contextlib.contextmanager
def graph(graph: CUDAGraph, *args: object, **kwargs: object) -> Iterator[None]:
    """`torch.cuda.graph`."""
    global _capturing
    graph.reset()
    _capturing = True
    try:
        with _Recorder(graph._calls):
            yield
    finally:
        _capturing = False


def _nothing() -> Callable[..., None]:
    return lambda *args, **kwargs: None


def _answer(value: object) -> Callable[..., object]:
    return lambda *args, **kwargs: value


def _context() -> type:
    """A context manager that does nothing: there is one stream and one device."""
    return type("context", (contextlib.nullcontext,), {})


# A small L2 is overwritten quickly.
_PROPERTIES = SimpleNamespace(
    name="stand-in", major=9, minor=0, L2_cache_size=1 << 16, total_memory=80 << 30,
    multi_processor_count=132, gcnArchName="stand-in",
)  # fmt: skip

# Each is a distinct object: torch.compile registers each and refuses duplicates.
_STAND_INS: dict[str, object] = {
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": graph,
    "stream": _context(),
    "device": _context(),
    "device_of": _context(),
    "current_stream": lambda device=None: Stream(),
    "default_stream": lambda device=None: Stream(),
    "current_device": _answer(0),
    "set_device": _nothing(),
    "device_count": _answer(1),
    "get_device_name": _answer(_PROPERTIES.name),
    "get_device_capability": _answer((_PROPERTIES.major, _PROPERTIES.minor)),
    "get_device_properties": _answer(_PROPERTIES),
    "is_current_stream_capturing": lambda: _capturing,
    "synchronize": _nothing(),
    "set_sync_debug_mode": _nothing(),
    "memory_allocated": _answer(0),
    "max_memory_allocated": _answer(0),
    "reset_peak_memory_stats": _nothing(),
    "empty_cache": _nothing(),
    "_sleep": _nothing(),
}


def install() -> Callable[[], None]:
    """Replace those parts of `torch.cuda`, and CUPTI; the returned function restores them."""
    parts = {name: getattr(torch.cuda, name) for name in _STAND_INS}
    real = sys.modules.get("cupti")
    package = ModuleType("cupti")
    package.__dict__["cupti"] = cupti
    sys.modules["cupti"] = package
    _put(_STAND_INS)

    def undo() -> None:
        _put(parts)
        del sys.modules["cupti"]
        if real:
            sys.modules["cupti"] = real

    return undo


def _put(parts: Mapping[str, object]) -> None:
    for name, part in parts.items():
        setattr(torch.cuda, name, part)
