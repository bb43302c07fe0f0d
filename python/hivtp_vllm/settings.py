"""An engine's settings, read from the config of its model."""

from __future__ import annotations

from typing import Any

from hivtp_transformers.serving import Serving

MODEL_TYPES = ("llava", "llava_next")


def serving_of(config: Any) -> Serving:
    """Return how an engine prunes.

    Raises
    ------
    TypeError, ValueError
        As `Serving` does, and if the model uses features that vLLM does not compute.
    """
    serving = Serving(config, MODEL_TYPES)
    if len(serving.family.features_of) > 1 or serving.family.unshown:
        raise ValueError(
            "model.config.vision_feature_layer must be one layer, and every patch must reach the "
            f"language model, in vLLM, got {config.vision_feature_layer!r} with "
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}"
        )
    return serving
