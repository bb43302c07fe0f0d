"""ViP-LLaVA: LLaVA-1.5 with the features of five layers."""

from typing import Any

from torch import Tensor
from transformers import VipLlavaForConditionalGeneration

from .family import Family, joined


class VipLlava(Family):
    """A `VipLlavaForConditionalGeneration`."""

    model_class = VipLlavaForConditionalGeneration

    def encoder_output(self, features: list[Tensor], *deeper: list[Tensor]) -> Any:
        """Return the features of all images as one tensor."""
        return joined(features)

    def _feature_layer(self) -> Any:
        # Named so before transformers 5.
        layers = getattr(self.config, "vision_feature_layer", None)
        return self.config.vision_feature_layers if layers is None else layers

    def _leading(self) -> int:
        return 1  # the model always drops the CLS token, and has no setting for it
