"""Selection of patches by comparing 64-bit keys: one program per image, exact, without sorting."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..types import FILLED, GLOBAL, LOCAL, MAX_PATCHES, PADDING

INDEX_BITS: tl.constexpr = tl.constexpr((MAX_PATCHES - 1).bit_length())
KEY_BITS: tl.constexpr = tl.constexpr(32 + INDEX_BITS.value)
LAST_INDEX: tl.constexpr = tl.constexpr(MAX_PATCHES - 1)
GLOBAL_STAGE: tl.constexpr = tl.constexpr(GLOBAL)
LOCAL_STAGE: tl.constexpr = tl.constexpr(LOCAL)
FILL_STAGE: tl.constexpr = tl.constexpr(FILLED)
PADDING_STAGE: tl.constexpr = tl.constexpr(PADDING)


class FlatParams(NamedTuple):
    """The integers of `types.SelectParams`, with the quotas as in `backends/_quotas.py`.

    Kernels take them one by one and pack them again: Triton specializes integers inside tuples on
    values of 1 and multiples of 16, so that each budget could compile another kernel.
    """

    height: int
    width: int
    region_rows: int
    region_columns: int
    window_height: int
    window_width: int
    capacity: int
    fill: int
    base_0: int
    base_1: int
    base_2: int
    base_3: int
    cut_0: int
    cut_1: int
    cut_2: int
    cut_3: int


@triton.jit
def sort_key(score, index, valid):
    """The order (score descending, index ascending) as an integer, greater is better; else -1."""
    score = tl.where(score != score, float("-inf"), score)
    # The two zeros compare equal, so they must get equal bits.
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + (1 << 31)
    return tl.where(valid, (ordered << INDEX_BITS) | (LAST_INDEX - index), -1)


@triton.jit
def nth_largest(key, n):
    """The `n[c]`-th largest key of each column `c`; for `n[c] = 0` a number above all keys."""
    cut = tl.zeros_like(n).to(tl.int64)
    bit = tl.full([], 1, tl.int64) << KEY_BITS
    for _ in range(KEY_BITS):
        bit = bit >> 1
        candidate = cut | bit
        count = tl.sum((key >= candidate[None, :]).to(tl.int32), axis=0)
        cut = tl.where(count >= n, candidate, cut)
    return cut


@triton.jit
def global_stage(scores, stages, params, BLOCK: tl.constexpr, AREA: tl.constexpr):
    """Mark the best patches of each region; a column of the block is a region."""
    COLUMNS: tl.constexpr = BLOCK // AREA
    regions = params.region_rows * params.region_columns
    element = tl.arange(0, AREA)[:, None]
    for first in range(0, regions, COLUMNS):
        region = first + tl.arange(0, COLUMNS)
        y, x = region // params.region_columns, region % params.region_columns
        top = tl.cdiv(y * params.height, params.region_rows)
        left = tl.cdiv(x * params.width, params.region_columns)
        height = tl.cdiv((y + 1) * params.height, params.region_rows) - top
        width = tl.cdiv((x + 1) * params.width, params.region_columns) - left

        tall = height * params.region_rows > params.height
        wide = width * params.region_columns > params.width
        base = tl.where(
            tall,
            tl.where(wide, params.base_3, params.base_2),
            tl.where(wide, params.base_1, params.base_0),
        )
        cut = tl.where(
            tall,
            tl.where(wide, params.cut_3, params.cut_2),
            tl.where(wide, params.cut_1, params.cut_0),
        )
        quota = base + (region < cut).to(tl.int32)

        row, column = element // width[None, :], element % width[None, :]
        index = (top[None, :] + row) * params.width + left[None, :] + column
        inside = (region < regions)[None, :] & (row < height[None, :])
        key = sort_key(tl.load(scores + index, mask=inside, other=0.0), index, inside)
        best = key >= nth_largest(key, quota)[None, :]
        tl.store(stages + index, tl.where(best, GLOBAL_STAGE, PADDING_STAGE), mask=inside)


@triton.jit
def local_stage(scores, stages, params, BLOCK: tl.constexpr, AREA: tl.constexpr):
    """Mark the best remaining patch of each window; a column of the block is a window."""
    COLUMNS: tl.constexpr = BLOCK // AREA
    columns = tl.cdiv(params.width, params.window_width)
    windows = tl.cdiv(params.height, params.window_height) * columns
    element = tl.arange(0, AREA)[:, None]
    for first in range(0, windows, COLUMNS):
        window = (first + tl.arange(0, COLUMNS))[None, :]
        row, column = element // params.window_width, element % params.window_width
        y = window // columns * params.window_height + row
        x = window % columns * params.window_width + column
        index = y * params.width + x
        # The block may have more elements than the window, so bound the row as well.
        inside = (row < params.window_height) & (y < params.height) & (x < params.width)
        left = inside & (tl.load(stages + index, mask=inside, other=GLOBAL_STAGE) == PADDING_STAGE)
        key = sort_key(tl.load(scores + index, mask=left, other=0.0), index, left)
        winner = left & (key == tl.max(key, axis=0)[None, :])
        tl.store(stages + index, LOCAL_STAGE, mask=winner)


@triton.jit
def select_image(
    scores,
    outputs,
    image,
    params,
    BLOCK: tl.constexpr,
    REGION_AREA: tl.constexpr,
    WINDOW_AREA: tl.constexpr,
):
    """Select from the contiguous `scores` of one image; `BLOCK >= patches`, all powers of two."""
    patches = params.height * params.width
    image = image.to(tl.int64)
    stages = outputs.workspace + image * (tl.cdiv(patches, 16) * 16)
    # Each step has its own layout, so they pass the stage of every patch through memory.
    global_stage(scores, stages, params, BLOCK, REGION_AREA)
    tl.debug_barrier()
    local_stage(scores, stages, params, BLOCK, WINDOW_AREA)
    tl.debug_barrier()

    index = tl.arange(0, BLOCK)[:, None]
    inside = index < patches
    stage = tl.load(stages + index, mask=inside, other=PADDING_STAGE).to(tl.int32)
    count = tl.sum((stage != PADDING_STAGE).to(tl.int32), axis=0)
    missing = (params.capacity - count) * params.fill
    if tl.sum(missing, axis=0) > 0:
        left = inside & (stage == PADDING_STAGE)
        key = sort_key(tl.load(scores + index, mask=left, other=0.0), index, left)
        best = key >= nth_largest(key, missing)[None, :]
        stage = tl.where(best, FILL_STAGE, stage)
        count += missing

    chosen = stage != PADDING_STAGE
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    indices = outputs.indices + image * params.capacity
    stage_out = outputs.stage + image * params.capacity
    tl.store(indices + place, index, mask=chosen)
    tl.store(stage_out + place, stage, mask=chosen)
    tail = (index >= count[None, :]) & (index < params.capacity)
    tl.store(indices + index, -1, mask=tail)
    tl.store(stage_out + index, PADDING_STAGE, mask=tail)
    tl.store(outputs.counts + image + tl.arange(0, 1), count)


@triton.jit(do_not_specialize=["scores", *FlatParams._fields])
def select_kernel(
    scores, outputs,
    height, width, region_rows, region_columns, window_height, window_width, capacity, fill,
    base_0, base_1, base_2, base_3, cut_0, cut_1, cut_2, cut_3,
    BLOCK: tl.constexpr, REGION_AREA: tl.constexpr, WINDOW_AREA: tl.constexpr,
):  # fmt: skip
    """Program `image` selects for one image."""
    params = FlatParams(
        height, width, region_rows, region_columns, window_height, window_width, capacity, fill,
        base_0, base_1, base_2, base_3, cut_0, cut_1, cut_2, cut_3,
    )  # fmt: skip
    image = tl.program_id(0)
    start = scores + image.to(tl.int64) * (height * width)
    select_image(start, outputs, image, params, BLOCK, REGION_AREA, WINDOW_AREA)
