"""vLLM's LLaVA-1.5 and LLaVA-NeXT, with images pruned before the projector."""

from __future__ import annotations

from typing import Any

import torch
from hivtp_transformers.layout import tower_rows
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
from .settings import serving_of
from .vision import Taps


class Pruned:
    """Mixin that prunes image tokens before vLLM's projector."""

    # Each rank may encode whole images.
    supports_encoder_tp_data = True
    # vLLM derives an adapter's token counts from placeholders, which are fewer than patches.
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.serving = serving_of(self.config)
        self.taps = Taps(self.vision_tower, self.serving)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the features of each image, `[count, C]`."""
        counts = kwargs.pop(COUNT, None)
        inputs = self._parse_and_validate_image_input(**kwargs)
        if inputs is None or inputs["type"] != "pixel_values":
            return super().embed_multimodal(**kwargs)
        # Per image one tile, or `[tiles, 3, height, width]`, which may be padded with more tiles.
        tiles = [t if t.dim() == 4 else t[None] for t in inputs["pixel_values"]]
        sizes = inputs.get("image_sizes")
        sizes = [(1, 1)] * len(tiles) if sizes is None else [(int(h), int(w)) for h, w in sizes]
        counts = [int(count) for count in counts]
        images = [self.serving.image(size) for size in sizes]
        if counts == [len(image.positions) for image in images]:
            return super().embed_multimodal(**kwargs)

        tiles = [t[: image.tiles] for t, image in zip(tiles, images, strict=True)]
        select = self.serving.select(sizes, counts, tiles[0].device)
        with self.taps as taps:
            hidden = self.vision_tower(torch.cat(tiles), feature_select_strategy="full")
            scores = taps.scores()
        kept = select(scores.flatten())
        rows = tower_rows(kept.units, scores.shape[1], hidden.shape[1] - scores.shape[1])
        projected = self.multi_modal_projector(hidden.flatten(0, 1).index_select(0, rows))
        newline = self.image_newline if self.serving.family.has_newlines else None
        return kept.arrange(projected, newline).split(counts)


class PrunedLlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    """Processor of the model below."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class HivtpLlavaForConditionalGeneration(Pruned, LlavaForConditionalGeneration):
    """LLaVA-1.5."""


class PrunedLlavaNextProcessor(PrunedProcessor, LlavaNextMultiModalProcessor):
    """Processor of the model below."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class HivtpLlavaNextForConditionalGeneration(Pruned, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""
