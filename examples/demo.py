"""Prune the visual tokens of a photo: `python examples/demo.py [PHOTO]`.

Asks LLaVA-1.5 about the photo, unpruned and pruned, times every stage of both, and draws the kept
patches and their scores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hivtp_kernels._errors import why_not

try:
    import matplotlib.figure  # noqa: F401  drawn with at the end, minutes later for a real model
    import torch
    import transformers
    from hivtp_transformers import Handle, apply
    from PIL import Image, ImageDraw, ImageFont, ImageOps
    from skimage import data
    from tqdm import tqdm
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
except Exception as error:
    needed = 'the demo needs pip install "hivtp_kernels[demo]"'
    print(f"error: {needed}: {why_not(error)}", file=sys.stderr)
    sys.exit(2)

# Two million parameters that know letters, colours and textures (trained in bench/accuracy/), and a
# scene that training did not see, with questions and their right answers.
SMALL_LLAVA = Path(__file__).parent / "small_llava"
QUESTION = "Describe this photo in one sentence."
ROUNDS = (
    7  # timed rounds; on a slow machine no new one starts after SECONDS, except for the first 3
)
SECONDS = 20.0
DECODED = 16  # tokens decoded per round
ANSWER = 48  # tokens of an answer, at most
STAGES = (
    "encode",
    "score + select",
    "compact prompt",
    "prefill",
    "decode, per token",
    "time to first token",
)

Times = dict[str, float]  # milliseconds of each stage
Answered = tuple[str, str, str, str]  # question, unpruned answer, pruned answer, right answer


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo; errors that the user can fix end in one line and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", nargs="?", metavar="PHOTO", help="default: a scene with letters")
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="a LLaVA-1.5 checkpoint; default: a small one that knows letters and textures",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="where the model runs (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="K",
        help="keep exactly K patches, or a share such as 0.33; default: the paper's ratios",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("hivtp_out"),
        metavar="DIR",
        help="where the picture goes (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        run(options.photo, options.model, options.device, options.budget, options.out)
    except ImportError as error:
        parser.exit(2, f"error: {why_not(error)}\n")
    except (OSError, TypeError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def _budget(text: str) -> int | float:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number of patches or a share such as 0.33, got {text!r}"
        ) from None


def run(
    photo: str | None, model_id: str | None, device: str, budget: int | float | None, out: Path
) -> None:
    """Print times and answers, and write `overlay.png` to `out`.

    Raises an OSError, TypeError or ValueError for what the user can fix.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if model_id is None:
        print(f"Model: a small LLaVA, which knows letters and textures: {SMALL_LLAVA}")
        right_answers = json.loads((SMALL_LLAVA / "questions.json").read_text())
        picture = _open(photo or SMALL_LLAVA / "scene.png")
    else:
        right_answers = {QUESTION: ""}
        picture = Image.fromarray(data.astronaut()) if photo is None else _open(photo)
    place = _device(device)
    out.mkdir(parents=True, exist_ok=True)
    model, processor = _load(model_id or str(SMALL_LLAVA), place)
    prompts = {question: _ask(processor, picture, question).to(place) for question in right_answers}
    inputs = dict(next(iter(prompts.values())))

    def pruned(**options: Any) -> Handle:
        return apply(model, budget=budget, **options)

    with pruned() as handle:
        if handle.compact(**inputs).get("pixel_values") is not None:
            raise ValueError(f"--budget must be less than all patches to prune, got {budget}")
        assert handle.stats is not None
        kept, overlay = handle.stats.kept[0], handle.overlay(picture, processor=processor)

    if place.type == "cpu":
        print(f"Threads: {_settle_threads(model, inputs)}, the faster of all and one.")
    print(_times_table(*_time_rounds(model, inputs, pruned), _image_tokens(model, inputs), kept))

    unpruned_answers = _answers(model, processor, prompts)
    with pruned():
        pruned_answers = _answers(model, processor, prompts)
    # The right answers are about the scene, not about a photo of the user's.
    right = list(right_answers.values()) if photo is None else [""] * len(prompts)
    answered = list(zip(prompts, unpruned_answers, pruned_answers, right, strict=True))
    print(_answers_table(answered))
    _with_answers(overlay, answered).save(out / "overlay.png")
    print(f"Picture: {out / 'overlay.png'}")


def _open(photo: str | Path) -> Image.Image:
    try:
        with Image.open(photo) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"PHOTO must be an image that Pillow reads, got {str(photo)!r}: {error}"
        ) from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device must be one that torch can use here, got {name!r}: {_first_line(error)}"
        ) from error
    return device


def _load(model_id: str, device: torch.device) -> tuple[Any, Any]:
    """The model, on its device, and its processor."""
    try:
        model_type = AutoConfig.from_pretrained(model_id).model_type
    except (OSError, ValueError) as error:
        what = f"a checkpoint's directory or Hub id, got {model_id!r}: {_first_line(error)}"
        raise ValueError(f"--model must be {what}") from error
    if model_type != "llava":
        raise ValueError(f"--model must be of type llava, got {model_type!r}")
    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto")
    return model.eval().to(device), AutoProcessor.from_pretrained(model_id)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _ask(processor: Any, picture: Image.Image, question: str) -> Any:
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        conversation = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )
    else:
        text = f"USER: <image>\n{question} ASSISTANT:"
    return processor(images=picture, text=text, return_tensors="pt")


def _image_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


@torch.no_grad()
def _settle_threads(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Keep torch to one thread where more are slower, as on cores that are busy already."""

    def encode() -> Any:
        return model.model.get_image_features(inputs["pixel_values"])

    times = {}
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        encode()
        times[threads] = _timed(model.device, encode)
    fastest = min(times, key=lambda threads: times[threads])
    torch.set_num_threads(fastest)
    return fastest


@torch.no_grad()
def _time_rounds(
    model: Any, inputs: dict[str, torch.Tensor], pruned: Callable[..., Handle]
) -> tuple[Times, Times]:
    """Median times of alternating rounds, unpruned and pruned; the first round warms up."""
    unpruned_rounds, pruned_rounds = [], []
    start = time.perf_counter()
    with tqdm(total=1 + ROUNDS, desc="timing", unit="round", leave=False) as progress:
        while progress.n < 4 or (progress.n <= ROUNDS and time.perf_counter() < start + SECONDS):
            unpruned_rounds.append(_time_unpruned(model, inputs))
            pruned_rounds.append(_time_pruned(model, inputs, pruned))
            progress.update()
    return _medians(unpruned_rounds[1:]), _medians(pruned_rounds[1:])


def _medians(rounds: list[Times]) -> Times:
    return {stage: statistics.median(times[stage] for times in rounds) for stage in rounds[0]}


def _time_unpruned(model: Any, inputs: dict[str, torch.Tensor]) -> Times:
    return _time_stages(model, inputs) | {
        "time to first token": _time_to_first_token(model, inputs)
    }


def _time_pruned(
    model: Any, inputs: dict[str, torch.Tensor], pruned: Callable[..., Handle]
) -> Times:
    with pruned(profile=True) as handle:
        short = handle.compact(**inputs)
        assert handle.stats is not None
        before = handle.stats.milliseconds
    times = _time_stages(model, short)
    with pruned():
        first = _time_to_first_token(model, inputs)
    return times | {
        "encode": before["encode"] + before["project"] + times["encode"],
        "score + select": before["score_and_select"],
        "compact prompt": before["compact"],
        "time to first token": first,
    }


def _time_stages(model: Any, inputs: dict[str, Any]) -> Times:
    """Encode (everything before the language model), prefill, and decode per token."""
    if "inputs_embeds" in inputs:  # with an older transformers, `compact` returns both
        inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
    reached = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda *_: reached.append(_now(model.device))
    )
    start = _now(model.device)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    end = _now(model.device)
    hook.remove()
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def decode() -> None:
        nonlocal token
        for _ in range(DECODED):
            step = model(token, past_key_values=cache, use_cache=True)
            token = step.logits[:, -1:].argmax(-1)

    return {
        "encode": reached[0] - start,
        "prefill": end - reached[0],
        "decode, per token": _timed(model.device, decode) / DECODED,
    }


def _time_to_first_token(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    return _timed(model.device, lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False))


def _timed(device: torch.device, work: Callable[[], Any]) -> float:
    """Milliseconds of `work`."""
    start = _now(device)
    work()
    return _now(device) - start


def _now(device: torch.device) -> float:
    """The clock in milliseconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def _times_table(unpruned: Times, pruned: Times, tokens: int, kept: int) -> str:
    lines = [("visual tokens", f"{tokens}", f"{kept}", _change(tokens, kept))]
    for stage in STAGES:
        before, after = unpruned.get(stage), pruned[stage]
        change = "" if before is None else _change(before, after)
        lines.append((stage, _milliseconds(before), _milliseconds(after), change))
    text = [f"{'':20}  {'unpruned, SDPA':>14}  {'pruned':>12}"]
    text += [f"{name:20}  {a:>14}  {b:>12}  {c:>7}".rstrip() for name, a, b, c in lines]
    return "\n".join(["", *text, ""])


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.0f} %"


def _answers(model: Any, processor: Any, prompts: dict[str, Any]) -> list[str]:
    answers = []
    for inputs in prompts.values():
        out = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True).strip() or "(nothing)")
    return answers


def _answers_table(answered: list[Answered]) -> str:
    if len(answered) == 1:
        _, unpruned, pruned, _ = answered[0]
        return f"unpruned: {unpruned}\npruned:   {pruned}"
    lines = [("", "unpruned", "pruned", "right" if answered[0][3] else ""), *answered]
    return "\n".join(f"{q:36}  {a:12}  {b:12}  {r}".rstrip() for q, a, b, r in lines)


def _with_answers(picture: Image.Image, answered: list[Answered]) -> Image.Image:
    """The picture with questions and answers to its right."""

    def wrapped(text: str) -> str:
        return textwrap.fill(text, 64, initial_indent="  ", subsequent_indent="  ")

    lines = [f"{question}\n{wrapped(f'{a}  |  {b}')}" for question, a, b, _ in answered]
    text = "\n".join(["unpruned | pruned", "", *lines])
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(18)
    width = int(draw.multiline_textbbox((0, 0), text, font)[2]) + 40
    wide = Image.new("RGB", (picture.width + width, picture.height), "white")
    wide.paste(picture)
    ImageDraw.Draw(wide).multiline_text((picture.width + 20, 40), text, "black", font, spacing=8)
    return wide


if __name__ == "__main__":
    main()
