"""Schema, fake and gradient of every op. `backends/` holds what they compute.

The ops are defined with `torch.library.Library`, not with `custom_op`, whose wrapper costs four
times as much per call, nor with `triton_op`, which cannot be checked on a machine without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from . import backends
from .types import Attention, Kept, SelectParams
from .version import __version__

# The fields of Attention and of SelectParams, in their order.
_ATTENTION = "Tensor[] q, Tensor[] k, Tensor[] lse, str rows, int prefix, float scale"
_PARAMS = "int[2] grid, int[2] regions, int[2] window, int[] quotas, int capacity, bool fill"
_SELECTION = "(Tensor indices, Tensor counts, Tensor stage)"

_SCHEMAS = (
    f"attention_scores({_ATTENTION}, str backend) -> Tensor",
    f"select_tokens(Tensor scores, {_PARAMS}, str backend) -> {_SELECTION}",
    f"score_and_select({_ATTENTION}, {_PARAMS}, str backend) -> {_SELECTION}",
    "gather_tokens(Tensor x, Tensor indices, int prefix, str backend) -> Tensor",
    "pack_tokens(Tensor x, Tensor indices, Tensor cu_seqlens, SymInt total, int prefix,"
    " str backend) -> Tensor",
)


def _library() -> torch.library.Library:
    """Define the ops, once per process, and return the library that takes their kernels.

    An op outlives this module: compiled graphs point to it, and calling one whose definition is
    gone reads freed memory. So if the package is imported a second time, after a purge of
    `sys.modules` or by a reload, the definitions stay and only the kernels are replaced.
    """
    origin = f"hivtp_kernels {__version__} in {Path(__file__).resolve().parent}"
    # Stored with the ops: no imported module lives as long.
    namespace = vars(torch.ops.hivtp)
    defined = namespace.get("_definitions")
    if defined is None:
        library = torch.library.Library("hivtp", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        defined = SimpleNamespace(origin=origin, schemas=_SCHEMAS, library=library, kernels=None)
        namespace["_definitions"] = defined
    elif (defined.origin, defined.schemas) != (origin, _SCHEMAS):
        got = origin if origin != defined.origin else "other schemas of the same ops"
        raise ImportError(
            f"hivtp_kernels must stay the same within a process, which has {defined.origin}, "
            f"got {got}: restart Python, with one copy on its path"
        )
    if defined.kernels is not None:
        # As `torch.library._scoped_library` does. The garbage collector would never do it: the old
        # kernels hold the old module.
        defined.kernels._destroy()
    defined.kernels = torch.library.Library("hivtp", "IMPL")
    return defined.kernels


_LIBRARY = _library()


def _attention(arguments: tuple) -> Attention:
    """The first arguments of a schema that begins with `_ATTENTION`."""
    return Attention(*arguments[: len(Attention._fields)])


def _params(arguments: tuple) -> SelectParams:
    """The arguments of a schema that ends with `_PARAMS` and the backend."""
    grid, regions, window, quotas, capacity, fill, _ = arguments[-len(SelectParams._fields) - 1 :]
    return SelectParams(tuple(grid), tuple(regions), tuple(window), tuple(quotas), capacity, fill)


def _attention_scores(*arguments) -> Tensor:  # type: ignore[no-untyped-def]
    attention = _attention(arguments)
    op = "attention_scores"
    run = backends.resolve(arguments[-1], attention.device, op, attention.rows)
    return run.attention_scores(attention)


def _select_tokens(scores, *arguments) -> Kept:  # type: ignore[no-untyped-def]
    run = backends.resolve(arguments[-1], scores.device, "select_tokens")
    return run.select_tokens(scores, _params(arguments))


def _score_and_select(*arguments) -> Kept:  # type: ignore[no-untyped-def]
    attention = _attention(arguments)
    op = "score_and_select"
    run = backends.resolve(arguments[-1], attention.device, op, attention.rows)
    return run.score_and_select(attention, _params(arguments))


def _gather_tokens(x, indices, prefix, backend) -> Tensor:  # type: ignore[no-untyped-def]
    run = backends.resolve(backend, x.device, "gather_tokens")
    return run.gather_tokens(x, indices, prefix)


def _pack_tokens(x, indices, cu_seqlens, total, prefix, backend) -> Tensor:  # type: ignore[no-untyped-def]
    run = backends.resolve(backend, x.device, "pack_tokens")
    return run.pack_tokens(x, indices, cu_seqlens, total, prefix)


@torch.library.register_fake("hivtp::attention_scores", lib=_LIBRARY)
def _(*arguments) -> Tensor:  # type: ignore[no-untyped-def]
    attention = _attention(arguments)
    shape = (attention.batch, attention.patches)
    return attention.k[0].new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("hivtp::select_tokens", lib=_LIBRARY)
def _(scores, *arguments) -> Kept:  # type: ignore[no-untyped-def]
    return _empty_selection(scores, _params(arguments).capacity)


@torch.library.register_fake("hivtp::score_and_select", lib=_LIBRARY)
def _(*arguments) -> Kept:  # type: ignore[no-untyped-def]
    return _empty_selection(_attention(arguments).k[0], _params(arguments).capacity)


@torch.library.register_fake("hivtp::gather_tokens", lib=_LIBRARY)
def _(x, indices, prefix, backend) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty((*indices.shape, x.shape[2]))


@torch.library.register_fake("hivtp::pack_tokens", lib=_LIBRARY)
def _(x, indices, cu_seqlens, total, prefix, backend) -> Tensor:  # type: ignore[no-untyped-def]
    return x.new_empty((total, x.shape[2]))


def _empty_selection(like: Tensor, capacity: int) -> Kept:
    batch = like.shape[0]
    return (
        like.new_empty((batch, capacity), dtype=torch.int32),
        like.new_empty(batch, dtype=torch.int32),
        like.new_empty((batch, capacity), dtype=torch.int8),
    )


def _save_gather(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, indices, ctx.prefix, _ = inputs
    ctx.rows = x.shape[1]
    ctx.save_for_backward(indices)


def _gather_backward(ctx, grad):  # type: ignore[no-untyped-def]
    (indices,) = ctx.saved_tensors
    return _scatter(grad, indices, ctx.rows, ctx.prefix), None, None, None


def _save_pack(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, indices, cu_seqlens, _, ctx.prefix, _ = inputs
    ctx.rows = x.shape[1]
    ctx.save_for_backward(indices, cu_seqlens)


def _pack_backward(ctx, grad):  # type: ignore[no-untyped-def]
    indices, cu_seqlens = ctx.saved_tensors
    row = cu_seqlens[:-1, None] + torch.arange(indices.shape[1], device=grad.device)
    padded = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
    padded = padded[torch.where(indices >= 0, row, grad.shape[0])]
    return _scatter(padded, indices, ctx.rows, ctx.prefix), None, None, None, None, None


def _scatter(grad: Tensor, indices: Tensor, rows: int, prefix: int) -> Tensor:
    """Put padded rows back in their places; padding goes to an extra last row, which is dropped."""
    batch, _, channels = grad.shape
    row = torch.where(indices >= 0, indices + prefix, rows).long()
    out = grad.new_zeros(batch, rows + 1, channels)
    return out.scatter(1, row[:, :, None].expand(-1, -1, channels), grad)[:, :rows]


for _name, _run in (
    ("attention_scores", _attention_scores),
    ("select_tokens", _select_tokens),
    ("score_and_select", _score_and_select),
    ("gather_tokens", _gather_tokens),
    ("pack_tokens", _pack_tokens),
):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _run, _key)

torch.library.register_autograd(
    "hivtp::gather_tokens", _gather_backward, setup_context=_save_gather, lib=_LIBRARY
)
torch.library.register_autograd(
    "hivtp::pack_tokens", _pack_backward, setup_context=_save_pack, lib=_LIBRARY
)
