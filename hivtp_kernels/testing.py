"""What tests and benchmarks share: tolerances, random inputs, and a comparison of scores."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative error of the scores, against fp64 arithmetic on the same inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random_qk(
    layers: int,
    batch: int,
    num_heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    interleaved: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Normally distributed `q` and `k` of each layer, `[batch, num_heads, tokens, head_dim]`.

    Parameters
    ----------
    layers, batch, num_heads, tokens, head_dim : int
        Number of tensors in each list, and their shape.
    dtype : torch.dtype
        Element type; values are drawn in fp32 and rounded.
    spread : float
        Standard deviation.
    seed : int
        Seed of the generator.
    device : str
        Where the tensors are drawn.
    interleaved : bool
        With the strides of a projection's output, `[batch, tokens, num_heads, head_dim]`
        transposed, rather than contiguous.

    Returns
    -------
    q, k : list of Tensor
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, num_heads, tokens, head_dim)
    if interleaved:
        shape = (batch, tokens, num_heads, head_dim)

    def draw() -> Tensor:
        values = (torch.randn(shape, generator=generator, device=device) * spread).to(dtype)
        return values.transpose(1, 2) if interleaved else values

    return [draw() for _ in range(layers)], [draw() for _ in range(layers)]


def scores_close(scores: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether fp32 scores have at most that relative error. NaN is never close."""
    return bool(((scores - expected).abs() <= tolerance * expected.abs()).all())
