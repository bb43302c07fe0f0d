"""LLaVA-1.5 and LLaVA-NeXT of vLLM, whose images are pruned before the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .processor import COUNT, PrunedProcessor
from .pruning import Pruning
from .vision import Taps


class Pruned:
    """In front of a model of vLLM's."""

    # Ranks may encode whole images each; and adapters on the tower would have to know its counts.
    supports_encoder_tp_data = True
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pruning = Pruning(self.config)
        self.taps = Taps(self.vision_tower, self.pruning)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features of each image, `[count, C]`."""
        counts = kwargs.pop(COUNT, None)
        images = self._parse_and_validate_image_input(**kwargs)
        if images is None or images["type"] != "pixel_values":
            return super().embed_multimodal(**kwargs)
        family = self.pruning.family
        # One tile an image, or some of `[tiles, 3, height, width]`, perhaps padded to more.
        tiles = [t if t.dim() == 4 else t[None] for t in images["pixel_values"]]
        sizes = images.get("image_sizes")
        sizes = [(1, 1)] * len(tiles) if sizes is None else [(int(h), int(w)) for h, w in sizes]
        counts = [int(count) for count in counts]
        if counts == [self.pruning.positions(size) for size in sizes]:
            return super().embed_multimodal(**kwargs)

        tiles = [t[: family.tiles(size)] for t, size in zip(tiles, sizes, strict=True)]
        with self.taps as taps:
            hidden = self.vision_tower(torch.cat(tiles), feature_select_strategy="full")
            scores = taps.scores()
        kept, first = [], 0
        for tile, size, count in zip(tiles, sizes, counts, strict=True):
            of_image = scores[first : first + len(tile)]
            patch = self.pruning.keep(of_image, size, count)
            kept.append(torch.where(patch < 0, patch, patch + first * scores.shape[1]))
            first += len(tile)
        return self._features(hidden, torch.cat(kept), scores.shape[1]).split(counts)

    def _features(self, hidden: Tensor, patch: Tensor, patches: int) -> Tensor:
        """Projects the rows of the kept patches alone, and puts the newlines between them."""
        prefix = hidden.shape[1] - patches
        shown = patch >= 0
        number = patch[shown] if self.pruning.family.newlines else patch
        row = number + (number // patches + 1) * prefix
        projected = self.multi_modal_projector(hidden.flatten(0, 1).index_select(0, row))
        if not self.pruning.family.newlines:
            return projected
        features = self.image_newline.to(projected).repeat(len(patch), 1)
        features[shown] = projected
        return features


class PrunedLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    """The processor of the model below."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class HivtpLlavaForConditionalGeneration(Pruned, LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class PrunedLlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """The processor of the model below."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class HivtpLlavaNextForConditionalGeneration(Pruned, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""
