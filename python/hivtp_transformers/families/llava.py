"""LLaVA-1.5: one square image, one placeholder per patch, an MLP projector."""

from transformers import LlavaForConditionalGeneration

from .family import Family


class Llava(Family):
    """A `LlavaForConditionalGeneration` with a CLIP or SigLIP tower, Mantis among them."""

    model_class = LlavaForConditionalGeneration
