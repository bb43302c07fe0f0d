"""Hand kept features to a model: encoded images where it takes them, else embeddings."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


def takes_features(model: PreTrainedModel) -> bool:
    """Whether `forward` takes images that are encoded already, as from transformers 5.18 on."""
    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def hand_over(
    model: PreTrainedModel,
    input_ids: Tensor,
    features: list[Tensor],
    image_token: int,
    joins_images: bool = False,
) -> dict[str, Any]:
    """What goes to `generate` beside `input_ids`, whose placeholders `features` fill in order.

    Embeddings go to `generate` together with the ids, which are what it returns and what looks at
    tokens (logits processors, prompt lookup); `forward` takes one or the other. Never synchronises.
    """
    if takes_features(model):
        # One token counts as an image, since images would have to be of one length. That makes no
        # difference to the model, and generate() finds out how many belong to a row.
        joined = torch.cat(features)[:, None] if joins_images else features
        # generate() edits this object in place, so every call gets a fresh one.
        images = BaseModelOutputWithPooling(pooler_output=joined)  # type: ignore[arg-type]
        return {"mm_encoder_outputs": {"image": images}}
    embeddings = model.get_input_embeddings()(input_ids)
    rows = [image.to(embeddings.device, embeddings.dtype) for image in features]
    places = (input_ids == image_token).unsqueeze(-1).to(embeddings.device)
    return {"inputs_embeds": embeddings.masked_scatter(places, torch.cat(rows))}
