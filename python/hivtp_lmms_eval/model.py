"""lmms-eval's `llava_hf` with pruning applied; prompts, templates and scoring stay its own."""

from __future__ import annotations

import json
from typing import Any

from hivtp_transformers import apply
from hivtp_transformers.policy import METHODS

from hivtp_kernels._errors import why_not

try:
    from accelerate import PartialState
    from lmms_eval.models.chat.llava_hf import LlavaHf
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
except Exception as error:
    raise ImportError(
        f"hivtp_lmms_eval needs lmms-eval>=0.7.3,<0.8, but {why_not(error)}: "
        'pip install "hivtp_kernels[lmms-eval]"'
    ) from error

PRUNING = ("budget", "layers", "rows", "newline", "backend")


class HivtpLlava(LlavaHf):
    """The model `hivtp_llava_hf` of lmms-eval.

    The results file reports the mean number of visual tokens per prompt with images, pruned or not,
    as `throughput.avg_visual_tokens`.

    Parameters
    ----------
    method : str
        As in `hivtp_transformers.apply`; "none" is the untouched model and accepts no arguments
        for pruning.
    **arguments
        `budget`, `layers`, `rows`, `newline` and `backend` as in `hivtp_transformers.apply`, with
        its defaults; write a list as `layers=[6,7,8]`. All others are those of `llava_hf`:
        `pretrained`, `revision`, `device`, `dtype`, `attn_implementation`, `device_map`, ...

    Raises
    ------
    TypeError, ValueError
        As `hivtp_transformers.apply`, before any dataset is loaded. An error that depends on the
        image, such as a `budget` too small for it, ends the run without results.

    Notes
    -----
    Synchronises as a pruned `generate` does, and like it cannot be captured in a CUDA graph.
    """

    def __init__(self, method: str = "hivtp", **arguments: Any) -> None:
        if method not in ("none", *METHODS):
            raise ValueError(f"method must be one of none, {', '.join(METHODS)}, got {method!r}")
        pruning = {name: arguments.pop(name) for name in PRUNING if name in arguments}
        if method == "none" and pruning:
            raise ValueError(
                f"{', '.join(pruning)} must be absent with method='none', got {pruning}"
            )
        if str(arguments.get("batch_size", 1)) != "1":
            raise ValueError(
                f"batch_size must be 1, as for lmms-eval's llava_hf, got {arguments['batch_size']}"
            )
        if isinstance(pruning.get("layers"), str):
            pruning["layers"] = _list(pruning["layers"])
        if PartialState().num_processes == 1:
            # transformers refuses the default of llava_hf, an empty string.
            arguments.setdefault("device_map", arguments.get("device", "cuda"))
        super().__init__(**arguments)
        handle = None if method == "none" else apply(self.model, method=method, **pruning)
        self._prunes = handle is not None
        self._visual_tokens: list[int] = []
        _watch(self.model, handle, self._visual_tokens)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Return the answers. An error ends the run: `llava_hf` would score an empty answer."""
        self._visual_tokens.clear()
        try:
            answers = super().generate_until(requests)
        except _Failure as failure:
            raise failure.error from None
        if self._visual_tokens:
            mean = sum(self._visual_tokens) / len(self._visual_tokens)
            log_metrics(0.0, 0, 0.0, {"visual_tokens": mean})
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Raise a NotImplementedError if pruned: `llava_hf` looks where unpruned answers are."""
        if self._prunes:
            raise NotImplementedError(
                "loglikelihood tasks need method=none: lmms-eval's llava_hf looks for the answer "
                "where it is in the unpruned prompt. Take a task of output_type generate_until."
            )
        return super().loglikelihood(requests)


class _Failure(BaseException):
    """Carries an error past `llava_hf`, which logs every Exception and gives an empty answer."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _watch(model: Any, handle: Any, visual_tokens: list[int]) -> None:
    """Pass on errors of `generate`, and record the visual tokens of each call with images."""
    generate = model.generate

    def watched(**inputs: Any) -> Any:
        try:
            out = generate(**inputs)
        except Exception as error:
            raise _Failure(error) from None
        if inputs.get("pixel_values") is not None:
            stats = handle and handle.stats
            placeholders = inputs["input_ids"] == model.config.image_token_id
            visual_tokens.append(sum(stats.kept) if stats else int(placeholders.sum()))
        return out

    model.generate = watched


def _list(text: str) -> Any:
    """Parse a list in model arguments; leave anything else for `apply` to refuse."""
    try:
        return json.loads(text)
    except ValueError:
        return text
