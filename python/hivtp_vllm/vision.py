"""Scores from the attention of vLLM's vision tower, equal on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

from hivtp_transformers.serving import Serving
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce

from hivtp_kernels import attention_scores


class Taps:
    """Context manager that records q and k of the chosen layers, whichever attention runs.

    It hooks the attention's inputs, not the projections' outputs: LoRA may replace projections.
    """

    def __init__(self, tower: Any, serving: Serving) -> None:
        self._serving = serving
        layers = tower.vision_model.encoder.layers
        self._attention = layers[serving.layers[0]].self_attn
        self._tapped: dict[int, tuple[Tensor, Tensor]] | None = None
        for layer in serving.layers:
            layers[layer].self_attn.attn.register_forward_pre_hook(partial(self._tap, layer))

    def __enter__(self) -> Taps:
        self._tapped = {}
        return self

    def __exit__(self, *error: object) -> None:
        self._tapped = None

    def scores(self) -> Tensor:
        """Return the scores of the encoded tiles, fp32 `[T, N]`. **Waits** for the other ranks."""
        assert self._tapped is not None
        tapped = [self._tapped[layer] for layer in self._serving.layers]
        attention = self._attention
        scores = attention_scores(
            [q for q, _ in tapped],
            [k for _, k in tapped],
            rows=self._serving.rows,
            prefix=self._serving.family.tower_class.prefix,
            scale=attention.scale,
        )
        ranks = attention.num_heads // attention.num_heads_per_partition
        # A rank with some of the heads has the mean over these alone.
        return tensor_model_parallel_all_reduce(scores) / ranks if ranks > 1 else scores

    def _tap(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._tapped is None:
            return
        heads = (self._attention.num_heads_per_partition, self._attention.head_dim)
        q, k = (t.unflatten(2, heads).transpose(1, 2) for t in args[:2])
        self._tapped[layer] = (q[:, :, :1] if self._serving.rows == "cls" else q, k)
