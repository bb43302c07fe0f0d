"""Copying the kept rows, padded or packed."""

import triton
import triton.language as tl


@triton.jit
def copy_rows(
    source,
    source_row,
    target,
    target_row,
    channels,
    real,
    written,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Copy one tile of channels of each row; offsets and `channels` count `UNIT` elements."""
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = channel < channels * UNIT
    value = tl.load(
        source + source_row[:, None] * UNIT + channel, mask=real[:, None] & inside, other=0.0
    )
    tl.store(target + target_row[:, None] * UNIT + channel, value, mask=written[:, None] & inside)


@triton.jit(
    do_not_specialize=[
        "x", "x_batch_stride", "x_token_stride", "indices", "cu_seqlens", "patches", "prefix",
        "capacity", "channels", "wide",
    ],
)  # fmt: skip
def gather_kernel(
    x,
    x_batch_stride: tl.int64,
    x_token_stride: tl.int64,
    indices,
    cu_seqlens,
    out,
    patches,
    prefix,
    capacity,
    channels,
    wide,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program `(image, tile of rows, tile of channels)`; packs if `cu_seqlens` is given.

    If `wide`, all rows start at multiples of 16 bytes, which are `UNIT` elements, and strides and
    channels count these units.
    """
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    index = tl.load(indices + image * capacity + row, mask=row < capacity, other=-1)
    real = (index >= 0) & (index < patches)
    source_row = image * x_batch_stride + (index + prefix).to(tl.int64) * x_token_stride
    if cu_seqlens is None:
        start = image * capacity
        written = row < capacity
    else:
        start = tl.load(cu_seqlens + image).to(tl.int64)
        # The bound holds even if padding is not at the end, where it should be.
        written = (index >= 0) & (start + row < tl.load(cu_seqlens + image + 1))
    target_row = (start + row) * channels
    # One kernel for all layouts: it chooses 16-byte accesses at run time.
    if wide:
        x, out = tl.multiple_of(x, 16), tl.multiple_of(out, 16)
        copy_rows(x, source_row, out, target_row, channels, real, written, UNIT, BLOCK_C)
    else:
        copy_rows(x, source_row, out, target_row, channels, real, written, 1, BLOCK_C)
