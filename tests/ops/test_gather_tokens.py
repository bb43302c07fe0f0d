import pytest
import torch

from hivtp_kernels import PruneConfig, gather_tokens, pack_tokens, select_tokens

CONFIG = PruneConfig(grid=(6, 7))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def selection(batch, config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    patches = config.grid[0] * config.grid[1]
    scores = torch.randn(batch, patches, generator=generator)
    # In the first image the global patches fill whole windows, so that counts differ.
    scores[:1].view(-1, *config.grid)[:, :2] += 10
    return select_tokens(scores, config, backend="torch")


def expected(x, kept, image):
    prefix = x.shape[1] - kept.grid[0] * kept.grid[1]
    return x[image, kept.indices[image, : kept.counts[image]].long() + prefix]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("channels", [1, 3, 64, 1024])
def test_values(channels, prefix, dtype, backend):
    kept = selection(3)
    assert kept.counts.unique().numel() > 1
    x = torch.randn(3, prefix + 42, channels).to(dtype)
    gathered = gather_tokens(x, kept, backend=backend)
    packed, cu_seqlens = pack_tokens(x, kept, backend=backend)
    assert gathered.shape == (3, CONFIG.capacity, channels)
    assert gathered.dtype == packed.dtype == dtype
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *kept.counts.cumsum(0).tolist()]
    for image, count in enumerate(kept.counts):
        assert torch.equal(gathered[image, :count], expected(x, kept, image))
        assert (gathered[image, count:] == 0).all()
        piece = packed[cu_seqlens[image] : cu_seqlens[image + 1]]
        assert torch.equal(piece, expected(x, kept, image))


def test_nan_rows_that_are_not_kept_do_not_leak(backend):
    kept = selection(2)
    x = torch.full((2, 43, 8), float("nan"))
    for image in range(2):
        x[image, kept.indices[image, : kept.counts[image]].long() + 1] = 1
    assert gather_tokens(x, kept, backend=backend).isfinite().all()
    assert (pack_tokens(x, kept, backend=backend)[0] == 1).all()


def test_strided_rows(backend):
    kept = selection(2)
    x = torch.randn(43, 2, 10)[:, :, :8].transpose(0, 1)
    assert torch.equal(
        gather_tokens(x, kept, backend=backend),
        gather_tokens(x.contiguous(), kept, backend="torch"),
    )
    assert torch.equal(
        pack_tokens(x, kept, backend=backend)[0],
        pack_tokens(x.contiguous(), kept, backend="torch")[0],
    )


@pytest.mark.parametrize("batch", [0, 1])
def test_batches(batch, backend):
    kept = selection(batch)
    x = torch.randn(batch, 43, 8)
    assert gather_tokens(x, kept, backend=backend).shape == (batch, CONFIG.capacity, 8)
    packed, cu_seqlens = pack_tokens(x, kept, backend=backend)
    assert packed.shape == (int(kept.counts.sum()), 8)
    assert cu_seqlens.shape == (batch + 1,)


def test_nothing_kept(backend):
    empty = PruneConfig(grid=(6, 7), ratio=0)
    kept = select_tokens(torch.randn(2, 42), empty, backend="torch")
    kept = kept._replace(
        indices=torch.full_like(kept.indices, -1), counts=torch.zeros_like(kept.counts)
    )
    x = torch.randn(2, 43, 8)
    assert (gather_tokens(x, kept, backend=backend) == 0).all()
    assert pack_tokens(x, kept, backend=backend)[0].shape == (0, 8)


@pytest.mark.parametrize("off", [-3, 3, -1000])
def test_pack_does_not_trust_counts(off, backend):
    """In a selection made by hand they may be anything, so the op counts the indices."""
    kept = selection(3)
    x = torch.randn(3, 43, 8)
    packed, cu_seqlens = pack_tokens(x, kept, backend=backend)
    kept = kept._replace(counts=kept.counts + off)
    assert torch.equal(pack_tokens(x, kept, backend=backend)[0], packed)
    assert torch.equal(pack_tokens(x, kept, backend=backend)[1], cu_seqlens)


@pytest.mark.parametrize("op", [gather_tokens, lambda *a, **b: pack_tokens(*a, **b)[0]])
def test_gradient(op, backend):
    kept = selection(2)
    x = torch.randn(2, 43, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: op(x, kept, backend=backend), x)
    (grad,) = torch.autograd.grad(op(x, kept, backend=backend).sum(), x)
    for image in range(2):
        rows = kept.indices[image, : kept.counts[image]].long() + 1
        assert grad[image].sum(1).nonzero().flatten().tolist() == rows.tolist()
