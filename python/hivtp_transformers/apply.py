"""`apply`: check every argument against the model, then switch pruning on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from hivtp_kernels import PruneConfig
from hivtp_kernels._checks import MAX_LAYERS
from hivtp_kernels.backends import check_name

from . import families
from .handle import Handle, handle_of
from .methods import METHODS
from .pruner import Pruner
from .rule import make_rule
from .towers import VisionTower


def apply(
    model: PreTrainedModel,
    config: PruneConfig | None = None,
    *,
    budget: int | float | None = None,
    method: str = "hivtp",
    layers: Sequence[int] = (6, 7, 8),
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
        A `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration`,
        `LlavaOnevisionForConditionalGeneration` (images) or `InternVLForConditionalGeneration`, or
        PEFT's wrapper of one; on any device, fp32, fp16 or bf16. Only this instance changes, and
        its `state_dict` does not.
    config : PruneConfig, optional
        What to keep of every tile; its grid is the vision tower's. By default the paper's rule,
        which keeps 252 to 288 of 24 x 24 patches, depending on the image. LLaVA-NeXT, whose images
        are several tiles, takes it in ratio mode only; kept patches that show padding disappear.
    budget : int or float, optional
        Keep exactly this many visual positions of every image instead, newlines included where
        they are kept; a float `0 < f < 1` is a share, rounded down. An image of no more positions
        is not pruned. LLaVA-NeXT shares it between the small copy of the image and the large one
        in proportion to their areas. Excludes `config`.
    method : {"hivtp", "topk", "uniform", "random"}
        The rule. All but "hivtp" are there to compare it with and need a `budget`: "topk" keeps the
        best patches of the whole image by the same scores (of all its tiles in one ranking),
        "uniform" an even lattice of each grid, "random" what a fixed seed and the image's own
        pixels draw, whatever else is in the batch. Their patches are all of stage 1. A ranking
        takes images of at most 4096 patches.
    layers : sequence of int
        The vision layers, from 0, whose attention scores the patches; 1 to 8 of them.
    rows : {"cls", "all"}, optional
        Attention rows that the scores average over: the CLS token's, or all of them, as the
        published code does. By default "cls" where the tower has a CLS token.
    newline : {"keep", "drop"}
        Whether the learned newlines of LLaVA-NeXT, which it was trained with, stay at the row ends;
        dropping them saves 24 to 50 tokens an image. Other models have none: "keep".
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
        Naming the argument, what came and what is legal. A model type without an adapter is refused
        by name.
    RuntimeError
        Where the model is pruned already.

    Notes
    -----
    `apply` itself neither runs the model nor synchronises. A pruned call reads the prompt's layout
    (one synchronisation) before the encoder starts; with an exact budget nothing synchronises
    between encoder and language model, otherwise the kept counts are read once. Because of the
    first read a call as a whole cannot be captured in a CUDA graph; the vision tower with its
    scores can.

    While it generates, the model works on the shortened prompt, and so does all that looks in: a
    streamer is given it first (then each new token), logits processors and stopping criteria see
    it in front of the new tokens, and a cache that is returned holds it. The ids that `generate`
    returns begin with the caller's own prompt. Where `forward` does not take `mm_encoder_outputs`
    (transformers before 5.18), `prefill_chunk_size`, prompt lookup, assisted decoding and
    `custom_generate` are refused beside images.

    References
    ----------
    HIVTP, arXiv 2509.23663.
    """
    if (inside := getattr(model, "get_base_model", None)) is not None:
        model = cast(Callable[[], PreTrainedModel], inside)()
    family = families.adapt(model)
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

    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method != "hivtp" and budget is None:
        raise ValueError(f"budget must be given with method={method!r}, which keeps exactly it")

    layers = check_layers(layers, family.depth)
    tower = VisionTower(
        model.model.vision_tower,
        depth=family.depth,
        layers=layers if METHODS[method] is None else (),  # nothing to tap for other scores
        rows=choose_rows(rows, family),
        normed=family.normed,
    )
    rule = make_rule(family, config, budget, newline, method)
    if rule.keeps_all and newline == "keep":
        return Handle(model, None)
    return Handle(model, Pruner(model, family, tower, rule, newline == "keep", backend, profile))


def _run_here(model: PreTrainedModel) -> Iterator[Tensor]:
    """The parameters that pruning uses outside of a module that hooks could fetch them for."""
    yield from model.model.vision_tower.parameters()
    yield from model.model.parameters(recurse=False)


def check_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """The layers to score by, or an error that says which there are."""
    legal = f"layers must be 1 to {MAX_LAYERS} different integers from 0 to {depth - 1}"
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise TypeError(f"{legal}, got {layers!r}")
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise TypeError(f"{legal}, got {layers!r}")
    in_range = all(0 <= layer < depth for layer in layers)
    if not in_range or not 1 <= len(layers) <= MAX_LAYERS or len(set(layers)) < len(layers):
        raise ValueError(f"{legal} (the vision layers that run), got {layers!r}")
    return tuple(layers)


def choose_rows(rows: str | None, family: families.Family) -> str:
    """The rows to average over, or an error that says what the tower has."""
    if rows is None:
        return "cls" if family.prefix else "all"
    if rows not in ("cls", "all"):
        raise ValueError(f"rows must be 'cls', 'all' or None, got {rows!r}")
    if rows == "cls" and not family.prefix:
        raise ValueError(
            f"rows must be 'all' or None for a vision tower without a CLS token "
            f"({family.config.vision_config.model_type}), got 'cls'"
        )
    return rows
