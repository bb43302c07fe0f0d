"""Generate from pruned inputs: settings that count the prompt, and the caller's prompt restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from . import prompt
from .arguments import by_name, refuse_videos
from .handover import takes_features

# Ways to generate whose first step may feed ids, not embeddings, and so placeholders whose features
# are gone.
FIRST_STEP_READS_IDS = (
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "custom_generate",
)


def is_compact(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether these may be from `Handle.compact`, which then gave ids and embeddings."""
    both = inputs.get("inputs_embeds") is not None and inputs.get("input_ids") is not None
    return both and not takes_features(model)


def generate(
    model: PreTrainedModel,
    own_generate: Callable[..., Any],
    compact: Callable[..., dict[str, Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call the model's own `generate` with what `compact` makes of the inputs.

    Lengths that include the prompt are shortened with it, and the sequences that are returned start
    with the caller's own prompt.
    """
    inputs = by_name(own_generate, args, kwargs)
    refuse_videos(inputs)
    settings = Settings(model, inputs)
    has_pixels = inputs.get("pixel_values") is not None
    if is_compact(model, inputs) or (has_pixels and not takes_features(model)):
        settings.refuse_reading_ids()
    if not has_pixels:
        return own_generate(*args, **kwargs)
    if (ids := inputs.pop("inputs", None)) is not None:
        if inputs.get("input_ids") is not None:
            raise ValueError("inputs and input_ids exclude each other, got both")
        inputs["input_ids"] = ids
    own_ids: Any = inputs.get("input_ids")
    if settings.get("token_healing"):
        raise ValueError("token_healing must be False alongside pixel_values, got True")
    if isinstance(own_ids, torch.Tensor):
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = settings.attention_mask(own_ids)
        settings.check_room(own_ids.shape[-1])

    short = compact(**inputs)
    length = short["input_ids"].shape[1]
    settings.shorten_lengths(short, own_ids.shape[1] - length)
    out = own_generate(**short)
    if isinstance(out, torch.Tensor):
        return prompt.restore(out, own_ids, length)
    out.sequences = prompt.restore(out.sequences, own_ids, length)
    return out


class Settings:
    """Generation settings as `generate` resolves them: arguments, their config, the model's."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        self._inputs = inputs
        self._configs: list[GenerationConfig | None] = [
            inputs.get("generation_config"),
            model.generation_config,
        ]

    def get(self, name: str) -> Any:
        """One setting, None if nobody set it."""
        values = [self._inputs.get(name), *(getattr(c, name, None) for c in self._configs)]
        return next((value for value in values if value is not None), None)

    def refuse_reading_ids(self) -> None:
        """Raise a ValueError for ways to generate that embeddings of kept features do not allow."""
        for name in FIRST_STEP_READS_IDS:
            if (value := self.get(name)) is not None:
                raise ValueError(
                    f"{name} must be None while pruning is applied with a transformers whose "
                    f"forward does not take mm_encoder_outputs (before 5.18), got {value!r}"
                )

    def attention_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The mask that `generate` infers if none is given and padding is distinguishable."""
        pad, eos = self.get("pad_token_id"), self.get("eos_token_id")
        if pad is None or pad in (eos if isinstance(eos, list | tuple) else [eos]):
            return None
        return (input_ids != pad).long()

    def check_room(self, tokens: int) -> None:
        """Refuse a `max_length` that the caller's own prompt fills, with the caller's figures."""
        length = self._inputs.get("max_length")
        if length is not None and self.get("max_new_tokens") is None and length <= tokens:
            raise ValueError(
                f"max_length must be more than the {tokens} tokens of input_ids, got {length}"
            )

    def shorten_lengths(self, inputs: dict[str, Any], removed: int) -> None:
        """Lower lengths that include the prompt with it, so that as many tokens are new."""
        lengths = {}
        for length, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if self.get(length) and self.get(new) is None:
                lengths[length] = max(self.get(length) - removed, 0)
        config = inputs.get("generation_config")
        if config is not None:
            config = inputs["generation_config"] = copy.deepcopy(config)
        for name, value in lengths.items():
            if config is None or inputs.get(name) is not None:
                inputs[name] = value
            else:
                setattr(config, name, value)
