"""Prompts with exactly one placeholder per position that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from hivtp_transformers.serving import BUDGET, Serving
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from .settings import serving_of

COUNT = "hivtp_count"


class PrunedProcessor:
    """Mixin that sizes prompts for pruned images. vLLM passes arguments by these names."""

    info: Any

    @cached_property
    def _serving(self) -> Serving:
        return serving_of(self.info.get_hf_config())

    def _get_prompt_updates(
        self,
        mm_items: Any,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: Any,
    ) -> Sequence[PromptUpdate]:
        image_token = self.info.get_hf_config().image_token_index

        def placeholders(index: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):  # encoded already, so there are no scores
                return [image_token] * images.get_feature_size(index)
            size = images.get_image_size(index)
            budget = hf_processor_mm_kwargs.get(BUDGET)
            return [image_token] * self._serving.count((size.height, size.width), budget)

        return [PromptReplacement("image", [image_token], placeholders)]

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> Any:
        own = {name: value for name, value in hf_kwargs.items() if name != BUDGET}
        return super()._call_hf_processor(hf_data, own)

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: Any,
    ) -> Any:
        data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        if "pixel_values" in data:
            # Alongside the pixels, so that the model keeps as many as the prompt has room for.
            sizes = data.get("image_sizes")
            if sizes is None:  # LLaVA-1.5: one tile, whatever the size
                sizes = [(1, 1)] * len(data["pixel_values"])
            budget = hf_processor_mm_kwargs.get(BUDGET)
            counts = [self._serving.count((int(h), int(w)), budget) for h, w in sizes]
            data[COUNT] = torch.tensor(counts)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, COUNT: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Add the engine's settings; vLLM hashes only what is part of a request."""
        hashes = super()._get_mm_hashes(inputs)
        key = self._serving.key
        return {name: [f"{one}-{key}" for one in of_items] for name, of_items in hashes.items()}
