"""`apply`: check every argument against the model, then switch pruning on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from hivtp_kernels import PruneConfig
from hivtp_kernels.backends import check_name

from . import families
from .handle import Handle, handle_of
from .policy import Policy
from .pruner import Pruner


def apply(
    model: PreTrainedModel,
    config: PruneConfig | None = None,
    *,
    budget: int | float | None = None,
    method: str = "hivtp",
    layers: Sequence[int] | None = None,
    rows: str | None = None,
    newline: str = "keep",
    backend: str = "auto",
    profile: bool = False,
) -> Handle:
    """Prune the visual tokens of every image that `model` is given, until the handle is removed.

    `model.generate(**inputs)` and `model(**inputs)` stay the calls to make. Images are encoded,
    scored and pruned before the model's own code runs, which then sees an ordinary, shorter prompt.
    Calls without `pixel_values` pass through untouched.

    Parameters
    ----------
    model : PreTrainedModel
        A `LlavaForConditionalGeneration`, `VipLlavaForConditionalGeneration`,
        `LlavaNextForConditionalGeneration`, `LlavaOnevisionForConditionalGeneration` (images) or
        `InternVLForConditionalGeneration`, or PEFT's wrapper of one; on any device, fp32, fp16 or
        bf16. Only this instance changes, and its `state_dict` does not.
    config : PruneConfig, optional
        Ratio mode: what to keep of every grid by itself; the config's grid is that of a tile. By
        default the paper's rule, which keeps 252 to 288 of 24 x 24 patches, depending on the image.
        LLaVA-NeXT prunes each tile, as in the paper, and kept patches that show padding disappear.
        For models with one grid per image it may have a budget, with regions and a window.
    budget : int or float, optional
        Keep exactly this many visual positions of every image instead, newlines included where
        they stay; shared over the image's grids in proportion to area, at least one unit each. A
        float `0 < f < 1` is a share, rounded down, and never less than the fewest positions that
        an image can have: its newlines and a unit per grid. An image with no more positions than
        the budget is not pruned. Excludes `config`.
    method : str
        How units are chosen. All but "hivtp" are there to compare it with, need a `budget`, and
        keep units of stage 1 alone. "topk": the highest scores of the whole image. "uniform": an
        even lattice on each grid, by no attention. "random": what a fixed seed and the image's own
        pixels draw, whatever else is in the batch, by no attention.
    layers : sequence of int, optional
        The vision layers, from 0, whose attention scores the units; 1 to 8 of them. By default from
        a quarter to a third of the tower's depth: 6, 7 and 8 of 24. None for methods that read no
        attention.
    rows : {"cls", "all"}, optional
        Attention rows that the scores average over: the CLS token's, or all of them, as the
        published code does. By default "cls" if the tower has a CLS token; None as for `layers`.
    newline : {"keep", "drop"}
        Whether the learned newlines of LLaVA-NeXT and LLaVA-OneVision, which they were trained
        with, stay at the row ends; dropping them saves 24 to 50 tokens per image. An image that a
        budget leaves whole keeps them. Other models have none: "keep".
    backend : str
        Backend of the ops, as in `hivtp_kernels`.
    profile : bool
        Measure the stages, for `Handle.stats`. Synchronises after each.

    Returns
    -------
    Handle
        Undoes it with `remove()`, or as a context manager.

    Raises
    ------
    TypeError, ValueError
        If an argument is not legal for the model; the message names the argument, its value and the
        accepted values. A model type that is not supported is refused by name.
    RuntimeError
        If the model is pruned already.

    Notes
    -----
    `apply` itself neither runs the model nor synchronises. A pruned call reads the prompt's layout
    (one synchronisation) before the encoder starts; with an exact budget nothing synchronises
    between encoder and language model, otherwise the kept counts are read once. Because of the
    first read a call as a whole cannot be captured in a CUDA graph; the vision tower with its
    scores can.

    While it generates, the model works on the shortened prompt, and so does everything that looks
    in: a streamer receives it first (then each new token), logits processors and stopping criteria
    see it in front of the new tokens, and a cache that is returned holds it. The ids that
    `generate` returns begin with the caller's own prompt. If `forward` does not take
    `mm_encoder_outputs` (transformers before 5.18), `prefill_chunk_size`, prompt lookup, assisted
    decoding and `custom_generate` are refused alongside images.

    References
    ----------
    HIVTP, arXiv 2509.23663.
    """
    if (inside := getattr(model, "get_base_model", None)) is not None:
        model = cast(Callable[[], PreTrainedModel], inside)()
    family = families.of_model(model)
    if handle_of(model) is not None:
        raise RuntimeError(
            "model is pruned already: call remove() on the handle of the first apply"
        )
    check_name(backend)
    if any(parameter.is_meta for parameter in _run_here(model)):
        raise ValueError(
            "model must have the weights of its vision tower on a device, got some that are "
            "offloaded: pass a device_map that leaves model.vision_tower where it runs"
        )
    policy = Policy(family, config, budget, newline, method)
    reads = "attention" in policy.method.needs
    for name, value in (("layers", layers), ("rows", rows)):
        if value is not None and not reads:
            raise ValueError(
                f"{name} must be None with method={method!r}, which reads no attention, "
                f"got {value!r}"
            )
    tower = family.tower_class(
        model.model.vision_tower,
        family.features_of,
        family.scored_layers(layers) if reads else (),
        family.scored_rows(rows),
    )
    if policy.keeps_all:
        return Handle(model, None)
    return Handle(model, Pruner(model, family, tower, policy, backend, profile))


def _run_here(model: PreTrainedModel) -> Iterator[Tensor]:
    """The parameters that pruning uses outside of a module that hooks could fetch them for."""
    yield from model.model.vision_tower.parameters()
    yield from model.model.parameters(recurse=False)
