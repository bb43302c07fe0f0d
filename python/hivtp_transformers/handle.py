"""Switch pruning on for one model instance, and off again without a trace."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from hivtp_kernels._errors import why_not

from . import prompt
from .handover import takes_features
from .pruner import Pruner, Stats

# Ways to generate whose first step may feed ids, not embeddings, and so placeholders for which
# nobody has the images any more.
FIRST_STEP_READS_IDS = (
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "custom_generate",
)

# What a step of a decoding loop is not given.
FIRST_STEP_INPUTS = ("pixel_values", "pixel_values_videos", "inputs_embeds")


class Handle:
    """Pruning as applied to one model. Made by `hivtp_transformers.apply`; a context manager."""

    def __init__(self, model: Any, pruner: Pruner | None) -> None:
        self._model = model
        self._pruner = pruner  # None: every patch is kept, and the model stays untouched
        self._stats: Stats | None = None
        self._image_inputs: list[Any] = []  # of the last call with images
        self._removed = False
        model._hivtp_handle = self
        if pruner is not None:
            pruner.tower.install()
            self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            self._own_generate = model.generate
            self._had_generate = "generate" in model.__dict__
            # Bound methods, not closures: a deep copy of the model gets a handle of its own.
            model.generate = self._generate

    @property
    def stats(self) -> Stats | None:
        """What pruning did in the last call with images, of any thread; None before the first."""
        return self._stats

    def compact(self, **inputs: Any) -> dict[str, Any]:
        """The inputs as the model gets them: kept features and the shortened prompt.

        For custom loops and conversations. An answer that is generated from these inputs starts
        with the shortened prompt, so that its tokens and its cache go together:

        >>> first = handle.compact(**inputs)  # doctest: +SKIP
        >>> out = model.generate(**first, return_dict_in_generate=True)  # doctest: +SKIP
        >>> ids = torch.cat([out.sequences, next_turn], dim=1)  # doctest: +SKIP
        >>> model.generate(ids, past_key_values=out.past_key_values)  # doctest: +SKIP

        Parameters
        ----------
        **inputs
            As for `model.generate` or `model.forward`: `input_ids` `[B, L]`, `pixel_values`
            `[images, 3, height, width]` and, where there is padding, `attention_mask` `[B, L]`;
            for LLaVA-NeXT `pixel_values` `[images, tiles, 3, height, width]` and `image_sizes`
            `[images, 2]`; `labels` `[B, L]`; the rest is handed through.

        Returns
        -------
        dict
            With `mm_encoder_outputs` instead of `pixel_values`, or, where `forward` does not take
            them (transformers before 5.18), `inputs_embeds` beside `input_ids`. Without images, the
            inputs as they came. Use it once: `generate` with beams changes the features in place.

        Raises
        ------
        ValueError
            For what cannot be pruned, before any work: embeddings instead of ids, a filled cache,
            position ids, placeholders that do not go with the images, or a budget too small for
            an image.
        RuntimeError
            After `remove`.

        Notes
        -----
        Synchronises once before the encoder runs, and once more behind it unless the budget is
        exact. Differentiable in the model's parameters.
        """
        if self._removed:
            raise RuntimeError("compact needs pruning to be applied, but remove() was called")
        if self._pruner is None:
            return inputs
        _refuse_videos(inputs)
        if inputs.get("pixel_values") is None:
            return inputs
        outputs, self._stats = self._pruner.prune(inputs)
        self._image_inputs = [inputs.get(name) for name in self._pruner.family.image_inputs]
        return outputs

    @torch.no_grad()
    def scores(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The importance of each patch, by which pruning decides.

        Parameters
        ----------
        pixel_values : Tensor
            `[images, 3, height, width]`, as the model takes them; for LLaVA-NeXT
            `[images, tiles, 3, height, width]`.
        image_sizes : Tensor, optional
            `[images, 2]`, height and width: for LLaVA-NeXT.

        Returns
        -------
        Tensor
            fp32 `[T, N]`, a row a tile, which in LLaVA-1.5 is an image; not differentiable. Never
            synchronises for LLaVA-1.5 and can be captured in a CUDA graph there; reads
            `image_sizes` first for LLaVA-NeXT.

        Raises
        ------
        ValueError
            Where the images are none of this model's.
        RuntimeError
            After `remove`, or where every patch is kept, so that none is scored.

        References
        ----------
        HIVTP, arXiv 2509.23663, importance score from the middle layers.
        """
        if self._removed or self._pruner is None:
            why = "remove() was called" if self._removed else "its budget keeps every patch"
            raise RuntimeError(f"scores needs pruning to be applied, but {why}")
        return self._pruner.scores(pixel_values, image_sizes)

    @torch.no_grad()
    def overlay(self, image: Any, index: int = 0) -> Any:
        """A picture of what the last call kept of an image, and why.

        Parameters
        ----------
        image : PIL.Image.Image or ndarray
            The photo as it was before the processor, `[height, width, 3]` in uint8 if an array; for
            InternVL the part of it that the tile shows.
        index : int
            Which image of that call it is (which tile, in InternVL).

        Returns
        -------
        PIL.Image.Image
            A row for each grid: one in LLaVA-1.5, in the middle of the photo, where the processors
            of its checkpoints cut; in LLaVA-NeXT and LLaVA-OneVision the base tile and all other
            tiles, stitched. On the left what is kept, coloured by stage, on the right the scores.

        Raises
        ------
        RuntimeError
            Before the first call with images, after `remove`, or where every patch is kept.
        IndexError
            Where the call had no such image.
        ImportError
            If matplotlib or Pillow is missing or broken; `pip install "hivtp_kernels[demo]"` brings
            both.

        Notes
        -----
        Encodes the images of the call once more, for their scores, and synchronises.
        """
        if self._removed or self._pruner is None or self._stats is None:
            raise RuntimeError(
                "overlay needs pruning to be applied and a call with images that it pruned"
            )
        try:
            from PIL import Image

            from .overlay import Grid, draw
        except Exception as error:
            raise ImportError(
                f'overlay needs pip install "hivtp_kernels[demo]": {why_not(error)}'
            ) from error
        photo = image if isinstance(image, Image.Image) else Image.fromarray(image)
        views = self._pruner.grids(self._image_inputs, self._stats.stage, index)
        boxes = self._pruner.family.views(*photo.size)
        # An image may have fewer grids than views: of a single tile there is no large copy.
        return draw([Grid(photo.crop(box), *view) for view, box in zip(views, boxes, strict=False)])

    def remove(self) -> None:
        """Undo `apply`: the model is bit for bit what it was. Calling it again does nothing."""
        if self._removed:
            return
        self._removed = True
        del self._model._hivtp_handle
        if self._pruner is not None:
            self._pruner.tower.remove()
            self._hook.remove()
            del self._model.generate
            if self._had_generate:
                self._model.generate = self._own_generate

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not args and all(kwargs.get(name) is None for name in FIRST_STEP_INPUTS):
            return None  # each step of a decoding loop: binding its arguments would take longer
        inputs = _by_name(self._model.forward, args, kwargs)
        _refuse_videos(inputs)
        if inputs.get("pixel_values") is not None:
            inputs = self.compact(**inputs)
        elif not self._embedded(inputs):
            return None
        if self._embedded(inputs):
            del inputs["input_ids"]  # `forward` takes one of them, where `generate` needs both
        return (), inputs

    def _embedded(self, inputs: dict[str, Any]) -> bool:
        """Whether these may be from `compact`, which then gave ids and embeddings."""
        both = inputs.get("inputs_embeds") is not None and inputs.get("input_ids") is not None
        return both and not takes_features(self._model)

    @torch.no_grad()
    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        inputs = _by_name(self._own_generate, args, kwargs)
        _refuse_videos(inputs)
        settings = Settings(self._model, inputs)
        has_pixels = inputs.get("pixel_values") is not None
        if self._embedded(inputs) or (has_pixels and not takes_features(self._model)):
            for name in FIRST_STEP_READS_IDS:
                if (value := settings.get(name)) is not None:
                    raise ValueError(
                        f"{name} must be None while pruning is applied with a transformers whose "
                        f"forward does not take mm_encoder_outputs (before 5.18), got {value!r}"
                    )
        if inputs.get("pixel_values") is None:
            return self._own_generate(*args, **kwargs)
        if (ids := inputs.pop("inputs", None)) is not None:
            if inputs.get("input_ids") is not None:
                raise ValueError("inputs and input_ids exclude each other, got both")
            inputs["input_ids"] = ids
        own_ids: Any = inputs.get("input_ids")
        if settings.get("token_healing"):
            raise ValueError("token_healing must be False beside pixel_values, got True")
        if inputs.get("attention_mask") is None and isinstance(own_ids, torch.Tensor):
            inputs["attention_mask"] = settings.attention_mask(own_ids)

        if isinstance(own_ids, torch.Tensor):
            settings.check_room(own_ids.shape[-1])

        short = self.compact(**inputs)
        length = short["input_ids"].shape[1]
        settings.shorten_lengths(short, own_ids.shape[1] - length)
        out = self._own_generate(**short)
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
        """One setting, None where nobody set it."""
        values = [self._inputs.get(name), *(getattr(c, name, None) for c in self._configs)]
        return next((value for value in values if value is not None), None)

    def attention_mask(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The mask that `generate` infers where none is given, while the padding can be told."""
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
        """Lengths that include the prompt go down with it, so that as many tokens are new."""
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


def _refuse_videos(inputs: dict[str, Any]) -> None:
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError(
            "pixel_values_videos must be None while pruning is applied, which is for images, got a "
            f"{type(inputs['pixel_values_videos']).__name__}: call remove() on the handle first"
        )


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of the pruning that is applied to `model`, if any."""
    return model.__dict__.get("_hivtp_handle")


def _by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call as keywords, whichever way they came."""
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named
