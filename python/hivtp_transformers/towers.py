"""Vision towers, a small class each: where its parts are, and how q and k are tapped."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hivtp_kernels.types import MAX_LAYERS


class Encoded(NamedTuple):
    """What the tower made of a batch of images.

    Attributes
    ----------
    hidden : Tensor
        `[T, prefix + N, C]`: outputs of the feature layers, concatenated along the channels.
    q, k : list of Tensor
        `[T, num_heads, tokens, head_dim]`, one per tapped layer: views of the projections' outputs.
    scale : float
        The attention's factor on `q k^T`.
    """

    hidden: Tensor
    q: list[Tensor]
    k: list[Tensor]
    scale: float


# What the hooks of one call have seen. Not a tower's attribute: calls may run in several threads.
_tapped: ContextVar[dict[tuple[int, str], Tensor] | None] = ContextVar("tapped", default=None)


class Tower:
    """A vision tower without the layers after the last one whose output is used.

    Hooks on the modules that make q and k of the tapped layers see what the attention computes
    anyway, whichever attention that is, so nothing is computed twice and no attention map exists.
    They stay installed from `install` to `remove` (`torch.compile` cannot trace installing them)
    and keep nothing unless `encode` is running.

    A subclass sets `prefix`, and overrides `grid`, `blocks`, `attention`, `taps`, `embed` and
    `finish` as far as its tower differs from SigLIP's.

    Attributes
    ----------
    prefix : int
        Tokens in front of the patches.

    Parameters
    ----------
    module : nn.Module
        The model's vision tower.
    features : sequence of int
        The hidden states that the projector takes; 1 is the output of the first layer.
    layers : sequence of int
        The layers to tap, from 0.
    rows : {"cls", "all"}
        Query rows that the scores average over.
    """

    prefix: ClassVar[int] = 0

    def __init__(
        self, module: Any, features: Sequence[int], layers: Sequence[int], rows: str
    ) -> None:
        # Older transformers wrap the module with the embeddings and layers.
        self.module = getattr(module, "vision_model", module)
        self.features = tuple(features)
        self.layers = tuple(layers)
        self.rows = rows
        self._blocks = self.blocks()[: max(features)]
        # Which masks a layer takes, and whether it needs them, depends on the transformers version.
        parameters = inspect.signature(type(self._blocks[0]).forward).parameters
        self._masks = {name: None for name in parameters if name.endswith("attention_mask")}
        self._hooks: list[RemovableHandle] = []

    @classmethod
    def grid(cls, config: Any) -> tuple[int, int]:
        """Rows and columns of patches, from the tower's config."""
        side = config.image_size // config.patch_size
        return side, side

    def blocks(self) -> Any:
        """Return all transformer layers, as a `ModuleList`."""
        return self.module.encoder.layers

    def attention(self, block: Any) -> Any:
        """Return the attention of a layer, which has `head_dim` and `scale`."""
        return block.self_attn

    def taps(self, attention: Any) -> dict[str, Any]:
        """Return the modules whose outputs are "q" and "k", `[T, tokens, C]`."""
        return {"q": attention.q_proj, "k": attention.k_proj}

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return what the first layer takes, `[T, tokens, C]`."""
        hidden: Tensor = self.module.embeddings(pixel_values)
        return hidden

    def finish(self, hidden: Tensor) -> Tensor:
        """Return the features, from the concatenated outputs of the feature layers."""
        return hidden

    def install(self) -> None:
        """Set the hooks."""
        for layer in self.layers:
            attention = self.attention(self._blocks[layer])
            for name, module in self.taps(attention).items():
                tap = partial(self._tap, (layer, name), attention.head_dim)
                self._hooks.append(module.register_forward_hook(tap))

    def remove(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    def encode(self, pixel_values: Tensor) -> Encoded:
        """Encode `[T, channels, height, width]`. Never synchronises."""
        tapped: dict[tuple[int, str], Tensor] = {}
        token = _tapped.set(tapped)
        try:
            hidden = self.embed(pixel_values.to(next(self.module.embeddings.parameters())))
            states = {}
            for depth, block in enumerate(self._blocks, start=1):
                out = block(hidden, **self._masks)
                hidden = out if isinstance(out, Tensor) else out[0]  # a tuple in transformers 4
                if depth in self.features:
                    states[depth] = hidden
        finally:
            _tapped.reset(token)
        features = [states[depth] for depth in self.features]
        joined = torch.cat(features, dim=-1) if len(features) > 1 else features[0]
        return Encoded(
            # SigLIP's embeddings are a transposed view, and the layers keep its strides.
            self.finish(joined).contiguous(),
            q=[tapped[layer, "q"] for layer in self.layers],
            k=[tapped[layer, "k"] for layer in self.layers],
            scale=self.attention(self._blocks[0]).scale,
        )

    def _tap(
        self,
        key: tuple[int, str],
        head_dim: int,
        module: nn.Module,
        args: tuple[Tensor],
        output: Tensor,
    ) -> None:
        tapped = _tapped.get()
        if tapped is None:
            return
        if self.rows == "cls" and key[1] == "q":
            output = output[:, :1]
        tapped[key] = output.unflatten(2, (-1, head_dim)).transpose(1, 2)


class Siglip(Tower):
    """SigLIP: no token in front of the patches."""


class Clip(Tower):
    """CLIP: a CLS token, and a norm before the first layer."""

    prefix = 1

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the normed embeddings."""
        hidden: Tensor = self.module.pre_layrnorm(super().embed(pixel_values))  # spelt like this
        return hidden


class InternViT(Tower):
    """InternVL's: a CLS token, norms after the projections of q and k, and one after the layers."""

    prefix = 1

    @classmethod
    def grid(cls, config: Any) -> tuple[int, int]:
        """Rows and columns of patches, from the tower's config."""
        height, width = (
            size // patch for size, patch in zip(config.image_size, config.patch_size, strict=True)
        )
        return height, width

    def blocks(self) -> Any:
        """Return all transformer layers."""
        return self.module.encoder.layer

    def attention(self, block: Any) -> Any:
        """Return the attention of a layer."""
        return block.attention

    def taps(self, attention: Any) -> dict[str, Any]:
        """Return the norms of q and k."""
        return {"q": attention.q_norm, "k": attention.k_norm}

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the embeddings."""
        out: Any = super().embed(pixel_values)
        return out if isinstance(out, Tensor) else out[0]  # a tuple in transformers 4

    def finish(self, hidden: Tensor) -> Tensor:
        """Norm the last layer's output; an earlier one is taken as it is."""
        if self.features[-1] < len(self.blocks()):
            return hidden
        normed: Tensor = self.module.layernorm(hidden)
        return normed


# What models of several families have; a family may have others, such as InternVL its own.
TOWERS: dict[str, type[Tower]] = {
    "clip_vision_model": Clip,
    "siglip_vision_model": Siglip,
}


def default_layers(depth: int) -> tuple[int, ...]:
    """From a quarter to a third of a tower's depth: the paper's 6, 7 and 8 of 24."""
    return tuple(range(depth // 4, depth // 3 + 1))[:MAX_LAYERS]


def choose_layers(layers: Sequence[int] | None, running: int, depth: int) -> tuple[int, ...]:
    """The layers to score by, of the `running` ones of a tower, or an error that says which."""
    if layers is None:
        return tuple(n for n in default_layers(depth) if n < running) or (running - 1,)
    legal = f"layers must be 1 to {MAX_LAYERS} different integers from 0 to {running - 1}"
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise TypeError(f"{legal}, got {layers!r}")
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise TypeError(f"{legal}, got {layers!r}")
    in_range = all(0 <= layer < running for layer in layers)
    if not in_range or not 1 <= len(layers) <= MAX_LAYERS or len(set(layers)) < len(layers):
        raise ValueError(f"{legal} (the vision layers that run), got {layers!r}")
    return tuple(layers)


def choose_rows(rows: str | None, tower: type[Tower], name: str) -> str:
    """The query rows to average over, or an error that says what the tower has."""
    if rows is None:
        return "cls" if tower.prefix else "all"
    if rows not in ("cls", "all"):
        raise ValueError(f"rows must be 'cls', 'all' or None, got {rows!r}")
    if rows == "cls" and not tower.prefix:
        raise ValueError(
            f"rows must be 'all' or None for a vision tower without a CLS token ({name}), got 'cls'"
        )
    return rows


def feature_layers(value: Any, depth: int) -> tuple[int, ...]:
    """The hidden states that a config's `vision_feature_layer` names, counted from the front."""
    named = list(value) if isinstance(value, list | tuple) else [value]
    legal = f"one of the tower's {depth} layers, or a list of them"
    if not named or any(isinstance(n, bool) or not isinstance(n, int) for n in named):
        raise ValueError(f"model.config.vision_feature_layer must name {legal}, got {value!r}")
    counted = tuple(n if n >= 0 else depth + 1 + n for n in named)
    if not all(1 <= n <= depth for n in counted):
        raise ValueError(f"model.config.vision_feature_layer must name {legal}, got {value!r}")
    return counted
