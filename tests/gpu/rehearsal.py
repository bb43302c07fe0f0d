"""Where the code of this folder runs: on a GPU or, as a rehearsal, on the CPU with stand-ins.

`HIVTP_REHEARSE=1` rehearses. Import this before Triton: it settles how its kernels run.
"""

import os

import torch

REHEARSE = bool(os.environ.get("HIVTP_REHEARSE"))
DEVICE = "cpu" if REHEARSE else "cuda"

if REHEARSE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from bench.ops import stand_in

    stand_in.install()


def pick(real, tiny):
    """The first on a GPU, the second in a rehearsal."""
    return tiny if REHEARSE else real


def attention(batch, heads, tokens, head_dim, layers, dtype, seed=0):
    """q and k of each layer as projections leave them: heads interleaved.

    Made on the CPU, so that the only kernels on the device are those under test.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, head_dim)

    def projection():
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE).transpose(1, 2)

    return tuple([projection() for _ in range(layers)] for _ in "qk")


def same(results, expected):
    """Whether all tensors are equal, bit for bit, wherever they are."""
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(results, expected, strict=True))
