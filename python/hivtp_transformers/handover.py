"""Hand kept features to a model: encoded images if it takes them, else embeddings."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from .families import Family


def takes_features(model: PreTrainedModel) -> bool:
    """Whether `forward` takes images that are encoded already, as from transformers 5.18 on."""
    return "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters


def hand_over(
    model: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    features: list[Tensor],
    *deeper: list[Tensor],
) -> dict[str, Any]:
    """What goes to `generate` next to `input_ids`, whose placeholders `features` fill in order.

    `features` are those of each image, `[n, C]`, and so are those of each level of `deeper`.
    Embeddings go to `generate` together with the ids, which it returns and which logits processors
    and prompt lookup look at; `forward` takes one or the other. Never synchronises.
    """
    if takes_features(model):
        # generate() edits this object in place, so every call gets a fresh one.
        return {"mm_encoder_outputs": {"image": family.encoder_output(features, *deeper)}}
    if deeper:
        raise NotImplementedError("features of several levels need forward(mm_encoder_outputs=)")
    embeddings = model.get_input_embeddings()(input_ids)
    rows = [image.to(embeddings.device, embeddings.dtype) for image in features]
    places = (input_ids == family.image_token).unsqueeze(-1).to(embeddings.device)
    return {"inputs_embeds": embeddings.masked_scatter(places, torch.cat(rows))}
