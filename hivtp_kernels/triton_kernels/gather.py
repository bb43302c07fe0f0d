"""Moves of kept rows, padded or packed."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["patches", "prefix", "capacity"])
def gather_kernel(
    x,
    x_batch_stride,
    x_token_stride,
    indices,
    cu_seqlens,
    out,
    patches,
    prefix,
    capacity,
    channels,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program `(image, tile of rows, tile of channels)`; packs where `cu_seqlens` is given."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    index = tl.load(indices + image * capacity + row, mask=row < capacity, other=-1)

    source = x + image * x_batch_stride + (index + prefix).to(tl.int64)[:, None] * x_token_stride
    real = (index >= 0) & (index < patches)
    value = tl.load(source + channel, mask=real[:, None] & (channel < channels), other=0.0)

    if cu_seqlens is None:
        start = image * capacity
        written = row < capacity
    else:
        start = tl.load(cu_seqlens + image).to(tl.int64)
        # The bound holds even where padding is not at the end, as it always should be.
        written = (index >= 0) & (start + row < tl.load(cu_seqlens + image + 1))
    target = out + (start + row)[:, None] * channels
    tl.store(target + channel, value, mask=written[:, None] & (channel < channels))
