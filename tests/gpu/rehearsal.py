"""The device of this folder's code: a GPU or, in a rehearsal, the CPU with stand-ins.

`HIVTP_REHEARSE=1` rehearses. Import this before Triton, since it may select Triton's interpreter.
"""

import os

import torch

from hivtp_kernels.testing import random_qk

REHEARSE = bool(os.environ.get("HIVTP_REHEARSE"))
DEVICE = "cpu" if REHEARSE else "cuda"

if REHEARSE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from bench.ops import stand_in

    stand_in.install()


def pick(real, tiny):
    """`real` on a GPU, `tiny` in a rehearsal."""
    return tiny if REHEARSE else real


def attention(batch, heads, tokens, head_dim, layers, dtype, seed=0):
    """`q` and `k` of each layer with the strides of a projection: heads interleaved.

    Created on the CPU, so that only the kernels under test run on the device.
    """
    made = random_qk(layers, batch, heads, tokens, head_dim, dtype, seed=seed, interleaved=True)
    return tuple([t.to(DEVICE) for t in tensors] for tensors in made)


def same(results, expected):
    """Whether all tensors are equal bit for bit, on whatever devices."""
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))
