"""Switch pruning on for one model instance, and off again without a trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hivtp_kernels._errors import why_not

from . import generation
from .arguments import by_name, refuse_videos
from .layout import by_grid
from .pruner import Pruner, Stats

# What a step of a decoding loop is not given.
FIRST_STEP_INPUTS = ("pixel_values", "pixel_values_videos", "inputs_embeds")


class Handle:
    """Pruning as applied to one model. Made by `hivtp_transformers.apply`; a context manager."""

    def __init__(self, model: Any, pruner: Pruner | None) -> None:
        self._model = model
        self._pruner = pruner  # None: every unit is kept, and the model stays untouched
        self._stats: Stats | None = None
        self._image_inputs: dict[str, Any] = {}  # of the last call with images
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
        """What pruning did in the last call with images, of any thread.

        None before the first, and if no image can lose a unit, so that the model is untouched.
        """
        return self._stats

    def compact(self, **inputs: Any) -> dict[str, Any]:
        """Return the inputs as the model gets them: kept features and the shortened prompt.

        For custom loops and conversations. An answer that is generated from these inputs starts
        with the shortened prompt, so that its tokens match its cache.

        Parameters
        ----------
        **inputs
            As for `model.generate` or `model.forward`: `input_ids` `[B, L]`, `pixel_values`
            `[images, 3, height, width]` and, if there is padding, `attention_mask` `[B, L]`;
            for LLaVA-NeXT `pixel_values` `[images, tiles, 3, height, width]` and `image_sizes`
            `[images, 2]`; `labels` `[B, L]`. Anything else is passed through.

        Returns
        -------
        dict
            With `mm_encoder_outputs` instead of `pixel_values`, or, if `forward` does not take
            them (transformers before 5.18), `inputs_embeds` next to `input_ids`. Without images,
            the inputs unchanged. Use it once: `generate` with beams changes the features in place.

        Raises
        ------
        ValueError
            For what cannot be pruned, before any work: embeddings instead of ids, a filled cache,
            position ids, placeholders that do not match the images, or a budget too small for an
            image.
        RuntimeError
            After `remove`.

        Notes
        -----
        Synchronises once before the encoder runs, and once more after it unless the budget is
        exact. Differentiable in the model's parameters.

        Examples
        --------
        >>> first = handle.compact(**inputs)  # doctest: +SKIP
        >>> out = model.generate(**first, return_dict_in_generate=True)  # doctest: +SKIP
        >>> ids = torch.cat([out.sequences, next_turn], dim=1)  # doctest: +SKIP
        >>> model.generate(ids, past_key_values=out.past_key_values)  # doctest: +SKIP
        """
        if self._removed:
            raise RuntimeError("compact needs pruning to be applied, but remove() was called")
        if self._pruner is None:
            return inputs
        refuse_videos(inputs)
        if inputs.get("pixel_values") is None:
            return inputs
        outputs, self._stats = self._pruner.prune(inputs)
        names = self._pruner.family.image_inputs
        self._image_inputs = {name: inputs.get(name) for name in names}
        return outputs

    @torch.no_grad()
    def scores(self, pixel_values: torch.Tensor, **image_inputs: Any) -> list[torch.Tensor]:
        """Return the score of each unit, by which pruning decides.

        Parameters
        ----------
        pixel_values : Tensor
            As the model takes them: `[images, 3, height, width]`; for LLaVA-NeXT
            `[images, tiles, 3, height, width]`; for InternVL `[tiles, 3, height, width]`.
        **image_inputs
            What else `forward` takes for images: `image_sizes`, `batch_num_images`. For InternVL
            `input_ids` tells which tiles are an image; without it each tile is one.

        Returns
        -------
        list of Tensor
            fp32 `[units]` for each image, not differentiable; units are numbered through the
            image's tiles. Never synchronises for LLaVA-1.5 and can be captured in a CUDA graph
            there; reads `image_sizes` or `input_ids` first for other models.

        Raises
        ------
        TypeError
            If the model takes no such argument for images.
        ValueError
            If the images are not this model's.
        RuntimeError
            After `remove`, or if every unit is kept, so that none is scored.

        References
        ----------
        HIVTP, arXiv 2509.23663, importance score from the middle layers.
        """
        if self._removed or self._pruner is None:
            why = "remove() was called" if self._removed else "its budget keeps every unit"
            raise RuntimeError(f"scores needs pruning to be applied, but {why}")
        names = (*self._pruner.family.image_inputs, "input_ids")
        if unknown := [name for name in image_inputs if name not in names]:
            raise TypeError(f"scores takes {', '.join(names)}, got {', '.join(unknown)}")
        return self._pruner.scores({"pixel_values": pixel_values, **image_inputs})

    @torch.no_grad()
    def overlay(
        self, image: Any, index: int = 0, *, processor: Any = None, fit: str | None = None
    ) -> Any:
        """Draw what the last call kept of an image, and why.

        Parameters
        ----------
        image : PIL.Image.Image or ndarray
            The photo before the processor, `[height, width, 3]` in uint8 if an array.
        index : int
            Which image of that call it is.
        processor : ProcessorMixin or image processor, optional
            The one that made the call's inputs. It tells how the photo was fitted to a square, for
            models with one grid per image; the tiles of other models show all of the photo.
        fit : {"crop", "squeeze", "pad"}, optional
            The same, said directly: the middle of the photo, all of it with another aspect ratio,
            or all of it with bars. Without either, "crop" for a CLIP tower and "squeeze" for
            SigLIP, as the processors of their checkpoints do.

        Returns
        -------
        PIL.Image.Image
            A row per grid. LLaVA-1.5 has one; LLaVA-NeXT and LLaVA-OneVision have the base tile and
            the other tiles, stitched; InternVL has its tiles. On the left what is kept, coloured by
            stage, on the right the scores.

        Raises
        ------
        ValueError
            If `fit` is none of these, or given for a model with tiles.
        RuntimeError
            Before the first call with images, after `remove`, or if every unit is kept.
        IndexError
            If the call had no such image.
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

            from . import overlay
        except Exception as error:
            raise ImportError(
                f'overlay needs pip install "hivtp_kernels[demo]": {why_not(error)}'
            ) from error
        stats, pruner = self._stats, self._pruner
        count = len(stats.kept)
        if not -count <= index < count:
            raise IndexError(
                f"index must be one of the {count} images of the last call, got {index}"
            )
        photo = image if isinstance(image, Image.Image) else Image.fromarray(image)
        fit = overlay.fit_of(fit, processor, pruner.family)
        scores = torch.cat(pruner.scores(self._image_inputs, stats._images))
        of_image = stats._images[index]
        boxes = pruner.family.views(of_image, (photo.height, photo.width), fit)
        grids = zip(stats.stages[index], by_grid(scores, stats._images)[index], boxes, strict=True)
        return overlay.draw([
            overlay.Grid(photo.crop(box), stage.cpu().numpy(), score.cpu().numpy())
            for stage, score, box in grids
        ])  # fmt: skip

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

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not args and all(kwargs.get(name) is None for name in FIRST_STEP_INPUTS):
            return None  # each step of a decoding loop: binding its arguments would take longer
        inputs = by_name(self._model.forward, args, kwargs)
        refuse_videos(inputs)
        if inputs.get("pixel_values") is not None:
            inputs = self.compact(**inputs)
        elif not generation.is_compact(self._model, inputs):
            return None
        if generation.is_compact(self._model, inputs):
            del inputs["input_ids"]  # `forward` takes one of them, where `generate` needs both
        return (), inputs

    @torch.no_grad()
    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        return generation.generate(self._model, self._own_generate, self.compact, *args, **kwargs)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of the pruning that is applied to `model`, if any."""
    return model.__dict__.get("_hivtp_handle")
