"""Importance scores: the attention that each patch receives, without materializing the map."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .select import FlatParams, select_image

# Strides of q and k count units of this many elements, so that the compiler can prove 16-byte loads
# without a variant of the kernel per layout.
UNIT: tl.constexpr = tl.constexpr(8)
# Running maxima start from this: from -inf, a row that starts with -inf would give -inf - -inf.
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


# Triton compiles variants for values of 1 and multiples of 16 of arguments not listed here.
ATTENTION = [
    *(f"{name}_{axis}_stride" for name in ("q", "k") for axis in ("batch", "head", "token")),
    "lse_batch_stride",
    "lse_head_stride",
    "scale",
    "heads",
    "tokens",
]
SCORES = [*ATTENTION, "patches", *FlatParams._fields]


class Layers(NamedTuple):
    """`q`, `k` or `lse` of all layers: one pointer per layer, and their common strides."""

    data: tuple[Any, ...]
    batch_stride: Any
    head_stride: Any


@triton.jit
def matrix(layers, layer, image, head):
    """Pointer to one layer, and the offset of one head of one image from it."""
    data = layers.data[0]
    for i in tl.static_range(1, len(layers.data)):
        data = tl.where(layer == i, layers.data[i], data)
    return data, image.to(tl.int64) * layers.batch_stride + head.to(tl.int64) * layers.head_stride


@triton.jit
def load_rows(
    data,
    start,
    token_stride,
    token,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows `token` of q or k, zero past the end, `[len(token), BLOCK_D]`."""
    data = tl.multiple_of(data, 16)
    channel = tl.arange(0, BLOCK_D)[None, :]
    offset = (start + token.to(tl.int64) * token_stride)[:, None] * UNIT
    mask = (token < tokens)[:, None] & (channel < HEAD_DIM)
    rows = tl.load(data + offset + channel, mask=mask, other=0.0)
    return rows.to(tl.float32) if UPCAST else rows


@triton.jit
def finish(
    weights, tickets, scores, outputs, params, image, rows, patches, programs, queries,
    BLOCK: tl.constexpr, REGION_AREA: tl.constexpr, WINDOW_AREA: tl.constexpr,
):  # fmt: skip
    """The last of an image's `programs` sums the `weights` of all, and selects into `outputs`."""
    tl.debug_barrier()
    if tl.atomic_add(tickets + image, 1, sem="acq_rel", scope="gpu") == programs - 1:
        weights += image.to(tl.int64) * rows * patches
        scores += image.to(tl.int64) * patches
        for first in range(0, patches, BLOCK):
            patch = first + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], tl.float32)
            for row in tl.range(0, rows, loop_unroll_factor=8192 // BLOCK):
                # Other programs wrote these, and L1 may hold older values.
                total += tl.load(
                    weights + row * patches + patch,
                    mask=patch < patches,
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(scores + patch, total / (rows * queries), mask=patch < patches)
        if outputs is not None:
            tl.debug_barrier()
            select_image(scores, outputs, image, params, BLOCK, REGION_AREA, WINDOW_AREA)


@triton.jit(do_not_specialize=SCORES)
def cls_kernel(
    q, q_batch_stride: tl.int64, q_head_stride: tl.int64, q_token_stride: tl.int64,
    k, k_batch_stride: tl.int64, k_head_stride: tl.int64, k_token_stride: tl.int64,
    lse, lse_batch_stride: tl.int64, lse_head_stride: tl.int64,
    weights, tickets, scores, outputs, scale, heads, tokens, patches,
    height, width, region_rows, region_columns, window_height, window_width, capacity, fill,
    base_0, base_1, base_2, base_3, cut_0, cut_1, cut_2, cut_3,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr, REGION_AREA: tl.constexpr, WINDOW_AREA: tl.constexpr,
):  # fmt: skip
    """Program `(image, row)` weighs the keys of one query row: one head of one layer."""
    image, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    layer, head = row // heads, row % heads
    prefix = tokens - patches
    weight = weights + (image.to(tl.int64) * rows + row) * patches

    data, start = matrix(Layers(q, q_batch_stride, q_head_stride), layer, image, head)
    query = load_rows(data, start, q_token_stride, tl.arange(0, 1), 1, HEAD_DIM, BLOCK_D, True)
    data, start = matrix(Layers(k, k_batch_stride, k_head_stride), layer, image, head)
    if lse is not None:
        lse_layers = Layers(lse, lse_batch_stride, lse_head_stride)
        lse_data, lse_start = matrix(lse_layers, layer, image, head)
        row_lse = tl.load(lse_data + lse_start)

    # A running maximum and sum per lane of the tile, joined once at the end.
    top = tl.full([BLOCK_T], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        key = load_rows(data, start, k_token_stride, token, tokens, HEAD_DIM, BLOCK_D, True)
        logit = tl.sum(query * key, axis=1) * scale
        mask = (token >= prefix) & (token < tokens)
        if lse is None:
            tl.store(weight + token - prefix, logit, mask=mask)
            logit = tl.where(token < tokens, logit, float("-inf"))
            new_top = tl.maximum(top, logit)
            total = total * tl.exp(top - new_top) + tl.exp(logit - new_top)
            top = new_top
        else:
            tl.store(weight + token - prefix, tl.exp(logit - row_lse), mask=mask)

    if lse is None:
        row_top = tl.max(top, axis=0)
        row_total = tl.sum(total * tl.exp(top - row_top), axis=0)
        # Other threads of the program wrote the logits of this row.
        tl.debug_barrier()
        for first in range(0, patches, BLOCK):
            patch = first + tl.arange(0, BLOCK)
            logit = tl.load(weight + patch, mask=patch < patches, other=LOWEST)
            tl.store(weight + patch, tl.exp(logit - row_top) / row_total, mask=patch < patches)

    params = FlatParams(
        height, width, region_rows, region_columns, window_height, window_width, capacity, fill,
        base_0, base_1, base_2, base_3, cut_0, cut_1, cut_2, cut_3,
    )  # fmt: skip
    finish(
        weights, tickets, scores, outputs, params, image, rows, patches, rows, 1,
        BLOCK, REGION_AREA, WINDOW_AREA,
    )  # fmt: skip


@triton.jit(do_not_specialize=ATTENTION)
def lse_kernel(
    q, q_batch_stride: tl.int64, q_head_stride: tl.int64, q_token_stride: tl.int64,
    k, k_batch_stride: tl.int64, k_head_stride: tl.int64, k_token_stride: tl.int64,
    lse, lse_batch_stride: tl.int64, lse_head_stride: tl.int64,
    scale, heads, tokens,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Program `(image, row, tile of queries)`: the logarithm of each query's sum over all keys."""
    image, row = tl.program_id(0), tl.program_id(1)
    layer, head = row // heads, row % heads
    data, start = matrix(Layers(q, q_batch_stride, q_head_stride), layer, image, head)
    query_token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = load_rows(data, start, q_token_stride, query_token, tokens, HEAD_DIM, BLOCK_D, UPCAST)

    data, start = matrix(Layers(k, k_batch_stride, k_head_stride), layer, image, head)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, tokens, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        key = load_rows(data, start, k_token_stride, token, tokens, HEAD_DIM, BLOCK_D, UPCAST)
        logit = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        logit = tl.where((token < tokens)[None, :], logit, float("-inf"))
        # tl.maximum drops NaN, which then reaches the row through its sum.
        new_top = tl.max(tl.maximum(logit, top[:, None]), axis=1)
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logit - new_top[:, None]), axis=1)
        top = new_top
    data, start = matrix(Layers(lse, lse_batch_stride, lse_head_stride), layer, image, head)
    tl.store(data + start + query_token, top + tl.log(total), mask=query_token < tokens)


@triton.jit(do_not_specialize=SCORES)
def columns_kernel(
    k, k_batch_stride: tl.int64, k_head_stride: tl.int64, k_token_stride: tl.int64,
    lse, lse_batch_stride: tl.int64, lse_head_stride: tl.int64,
    q, q_batch_stride: tl.int64, q_head_stride: tl.int64, q_token_stride: tl.int64,
    weights, tickets, scores, outputs, scale, heads, tokens, patches,
    height, width, region_rows, region_columns, window_height, window_width, capacity, fill,
    base_0, base_1, base_2, base_3, cut_0, cut_1, cut_2, cut_3,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, REGION_AREA: tl.constexpr, WINDOW_AREA: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Program `(image, row, tile of keys)` sums the map of one head of one layer over queries."""
    image, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    layer, head = row // heads, row % heads
    data, start = matrix(Layers(k, k_batch_stride, k_head_stride), layer, image, head)
    token = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    key = load_rows(data, start, k_token_stride, token, tokens, HEAD_DIM, BLOCK_D, UPCAST)

    data, start = matrix(Layers(q, q_batch_stride, q_head_stride), layer, image, head)
    lse_layers = Layers(lse, lse_batch_stride, lse_head_stride)
    lse_data, lse_start = matrix(lse_layers, layer, image, head)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, tokens, BLOCK_M):
        query_token = first + tl.arange(0, BLOCK_M)
        query = load_rows(
            data, start, q_token_stride, query_token, tokens, HEAD_DIM, BLOCK_D, UPCAST
        )
        logit = tl.dot(key, tl.trans(query), input_precision="ieee") * scale
        real = query_token < tokens
        row_lse = tl.load(lse_data + lse_start + query_token, mask=real, other=0.0)
        weight = tl.where(real[None, :], tl.exp(logit - row_lse[None, :]), 0.0)
        total += tl.sum(weight, axis=1)

    patch = token - (tokens - patches)
    weight_row = weights + (image.to(tl.int64) * rows + row) * patches
    tl.store(weight_row + patch, total, mask=(patch >= 0) & (token < tokens))
    params = FlatParams(
        height, width, region_rows, region_columns, window_height, window_width, capacity, fill,
        base_0, base_1, base_2, base_3, cut_0, cut_1, cut_2, cut_3,
    )  # fmt: skip
    finish(
        weights, tickets, scores, outputs, params, image, rows, patches,
        rows * tl.num_programs(2), tokens, BLOCK, REGION_AREA, WINDOW_AREA,
    )  # fmt: skip
