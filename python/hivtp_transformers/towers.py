"""Run a vision tower up to the layer that is used, and tap the attention of chosen layers."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Encoded(NamedTuple):
    """What the tower made of a batch of images.

    Attributes
    ----------
    hidden : Tensor
        `[B, prefix + N, C]`: output of the last layer that ran.
    q, k : list of Tensor
        `[B, heads, tokens, head_dim]`, one a tapped layer: views of the projections' outputs.
    scale : float
        Factor of the attention on `q k^T`.
    """

    hidden: Tensor
    q: list[Tensor]
    k: list[Tensor]
    scale: float


# What the hooks of one call have seen. Not a tower's attribute: calls may run in several threads.
_tapped: ContextVar[dict[tuple[int, str], Tensor] | None] = ContextVar("tapped", default=None)


def middle_layers(num_hidden_layers: int) -> tuple[int, ...]:
    """From a quarter to a third of a tower's depth: the paper's 6, 7 and 8 of 24."""
    return tuple(range(num_hidden_layers // 4, num_hidden_layers // 3 + 1))


def inner(tower: Any) -> Any:
    """The module with the embeddings and layers; older transformers wrap it."""
    return getattr(tower, "vision_model", tower)


def _attention(block: Any) -> Any:
    return block.self_attn if hasattr(block, "self_attn") else block.attention


class VisionTower:
    """A CLIP, SigLIP or InternVL tower without the layers behind the one that is used.

    Hooks on the `q_proj` and `k_proj` of the tapped layers (on the norms behind them in InternVL)
    see what the attention computes anyway, whichever attention that is, so nothing is computed
    twice and no attention map exists. They stay installed from `install` to `remove`
    (`torch.compile` cannot trace installing them) and keep nothing unless `encode` is running.
    """

    def __init__(
        self, module: Any, *, depth: int, layers: tuple[int, ...], rows: str, normed: bool
    ) -> None:
        self.rows = rows
        self.layers = layers
        self._module = inner(module)
        encoder = self._module.encoder
        self._blocks = (encoder.layers if hasattr(encoder, "layers") else encoder.layer)[:depth]
        self._norm = self._module.layernorm if normed else nn.Identity()
        # Which masks a layer takes, and whether it needs them, depends on the transformers version.
        parameters = inspect.signature(type(self._blocks[0]).forward).parameters
        self._masks = {name: None for name in parameters if name.endswith("attention_mask")}
        self._hooks: list[RemovableHandle] = []

    def install(self) -> None:
        """Set the hooks."""
        for layer in self.layers:
            attention = _attention(self._blocks[layer])
            for name in ("q", "k"):
                last = getattr(attention, f"{name}_norm", None) or getattr(
                    attention, f"{name}_proj"
                )
                tap = partial(self._tap, (layer, name), attention.head_dim)
                self._hooks.append(last.register_forward_hook(tap))

    def remove(self) -> None:
        """Take the hooks away again."""
        while self._hooks:
            self._hooks.pop().remove()

    def encode(self, pixel_values: Tensor) -> Encoded:
        """Encode `[B, channels, height, width]`. Never synchronises."""
        tapped: dict[tuple[int, str], Tensor] = {}
        token = _tapped.set(tapped)
        try:
            hidden = self._embed(pixel_values)
            for block in self._blocks:
                out = block(hidden, **self._masks)
                hidden = out if isinstance(out, Tensor) else out[0]  # a tuple in transformers 4
        finally:
            _tapped.reset(token)
        return Encoded(
            # SigLIP's embeddings are a transposed view, and the layers keep its strides.
            self._norm(hidden).contiguous(),
            q=[tapped[layer, "q"] for layer in self.layers],
            k=[tapped[layer, "k"] for layer in self.layers],
            scale=_attention(self._blocks[0]).scale,
        )

    def _embed(self, pixel_values: Tensor) -> Tensor:
        embeddings = self._module.embeddings
        hidden = embeddings(pixel_values.to(next(embeddings.parameters())))
        hidden = hidden if isinstance(hidden, Tensor) else hidden[0]  # InternVL's in transformers 4
        # Spelt like this in CLIP's checkpoints; SigLIP has none.
        if hasattr(self._module, "pre_layrnorm"):
            hidden = self._module.pre_layrnorm(hidden)
        return hidden

    def _tap(
        self,
        key: tuple[int, str],
        head_dim: int,
        projection: nn.Module,
        args: tuple[Tensor],
        output: Tensor,
    ) -> None:
        tapped = _tapped.get()
        if tapped is None:
            return
        if self.rows == "cls" and key[1] == "q":
            output = output[:, :1]
        tapped[key] = output.unflatten(2, (-1, head_dim)).transpose(1, 2)
