"""The demo: one photo through LLaVA-1.5, unpruned and pruned, asked, timed and drawn."""

from __future__ import annotations

import json
import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from skimage import data
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .apply import apply
from .handle import Handle
from .handover import hand_over
from .vision import middle_layers

# Two million parameters that know letters, colours and textures (bench/accuracy/), and a scene with
# questions that its training did not see.
SMALL_LLAVA = Path(__file__).parent / "small_llava"
QUESTION = "Describe this photo in one sentence."
ROUNDS, SECONDS = 7, 20.0  # timed rounds, and when to stop after the third on a busy machine
DECODED, ANSWER = 16, 48  # tokens decoded in a round, and in an answer
STAGES = (
    "encode",
    "score + select",
    "compact prompt",
    "prefill",
    "decode, per token",
    "time to first token",
)

Times = dict[str, float]


def run(
    photo: str | None, model_id: str | None, device: str, budget: int | float | None, out: Path
) -> None:
    """Print the table and the answers, write `overlay.png` into `out`.

    Raises an OSError, TypeError or ValueError for what the user can mend.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    small = model_id is None
    if small:
        print(f"Model: a small LLaVA, which knows letters and textures: {SMALL_LLAVA}")
        asked = json.loads((SMALL_LLAVA / "questions.json").read_text())
    else:
        asked = {QUESTION: ""}
    picture = _open(photo or (SMALL_LLAVA / "scene.png" if small else None))
    place = usable_device(device)
    out.mkdir(parents=True, exist_ok=True)
    model, processor = _load(model_id or str(SMALL_LLAVA))
    model.eval().to(place)
    prompts = {question: _ask(processor, picture, question).to(place) for question in asked}
    inputs = dict(next(iter(prompts.values())))
    layers = middle_layers(model.config.vision_config.num_hidden_layers)

    def pruned(**options: Any) -> Handle:
        return apply(model, budget=budget, layers=layers, **options)

    with pruned() as handle:
        if handle.compact(**inputs).get("pixel_values") is not None:
            raise ValueError(f"--budget must be less than all patches to prune, got {budget}")
        assert handle.stats is not None
        tokens, kept = handle.stats.kept[0], handle.overlay(picture)

    if place.type == "cpu":
        print(f"Threads: {_settle_threads(model, inputs)}, the faster of all and one.")
    times = _rounds(model, inputs, pruned)
    print(_times(times, inputs, model.config.image_token_id, tokens))

    unpruned_answers = _answers(model, processor, prompts)
    with pruned():
        pruned_answers = _answers(model, processor, prompts)
    # Of another photo nobody has said what is right.
    right = asked.values() if photo is None else [""] * len(asked)
    rows = list(zip(asked, unpruned_answers, pruned_answers, right, strict=True))
    print(_table(rows))
    _beside(kept, rows).save(out / "overlay.png")
    print(f"Picture: {out / 'overlay.png'}")


def _open(photo: str | Path | None) -> Image.Image:
    if photo is None:
        return Image.fromarray(data.astronaut())
    try:
        with Image.open(photo) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"PHOTO must be an image that Pillow reads, got {str(photo)!r}: {error}"
        ) from error


def usable_device(name: str) -> torch.device:
    """The device called `name`; a ValueError where torch cannot use it here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device must be one that torch can use here, got {name!r}: {reason}"
        ) from error
    return device


def checkpoint_config(model_id: str) -> Any:
    """The configuration of a LLaVA-1.5 checkpoint; a ValueError where it is none."""
    try:
        config = AutoConfig.from_pretrained(model_id)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--model must be a checkpoint's directory or Hub id, got {model_id!r}: {reason}"
        ) from error
    if config.model_type != "llava":
        raise ValueError(f"--model must be of type llava, got {config.model_type!r}")
    return config


def _load(model_id: str) -> tuple[Any, Any]:
    checkpoint_config(model_id)
    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto")
    return model, AutoProcessor.from_pretrained(model_id)


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


@torch.no_grad()
def _settle_threads(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Keep torch to one thread where several are slower, as they are on cores with other work."""

    def encode() -> Any:
        return model.model.get_image_features(inputs["pixel_values"])

    times = {}
    for threads in (torch.get_num_threads(), 1):
        torch.set_num_threads(threads)
        encode()
        times[threads] = _timed(model.device, encode)[1]
    fastest = min(times, key=lambda threads: times[threads])
    torch.set_num_threads(fastest)
    return fastest


@torch.no_grad()
def _rounds(
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
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    encoded, encode = _timed(
        model.device, lambda: model.model.get_image_features(inputs["pixel_values"])
    )
    features = list(getattr(encoded, "pooler_output", encoded))  # alone in transformers 4
    text |= hand_over(model, text["input_ids"], features, model.config.image_token_id)
    prefill, decode = _time_language_model(model, text)
    return {
        "encode": encode,
        "prefill": prefill,
        "decode, per token": decode,
        "time to first token": _time_to_first_token(model, inputs),
    }


def _time_pruned(
    model: Any, inputs: dict[str, torch.Tensor], pruned: Callable[..., Handle]
) -> Times:
    with pruned(profile=True) as handle:
        short = handle.compact(**inputs)
        assert handle.stats is not None
        stages = handle.stats.milliseconds
    prefill, decode = _time_language_model(model, short)
    with pruned():
        first = _time_to_first_token(model, inputs)
    return {
        "encode": stages["encode"] + stages["project"],
        "score + select": stages["score_and_select"],
        "compact prompt": stages["compact"],
        "prefill": prefill,
        "decode, per token": decode,
        "time to first token": first,
    }


def _time_language_model(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds of prefill, and of each token that is decoded after it."""
    if "inputs_embeds" in inputs:  # as compact() gives them with an older transformers
        inputs = {name: value for name, value in inputs.items() if name != "input_ids"}
    out, prefill = _timed(model.device, lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def decode() -> None:
        nonlocal token
        for _ in range(DECODED):
            step = model(token, past_key_values=cache, use_cache=True)
            token = step.logits[:, -1:].argmax(-1)

    return prefill, _timed(model.device, decode)[1] / DECODED


def _time_to_first_token(model: Any, inputs: dict[str, torch.Tensor]) -> float:
    return _timed(
        model.device, lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False)
    )[1]


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    result = work()
    return result, (now() - start) * 1e3


def _times(
    times: tuple[Times, Times], inputs: dict[str, torch.Tensor], image_token: int, kept: int
) -> str:
    unpruned, pruned = times
    tokens = int((inputs["input_ids"] == image_token).sum())
    rows = [("visual tokens", f"{tokens}", f"{kept}", _change(tokens, kept))]
    for stage in STAGES:
        before, after = unpruned.get(stage), pruned[stage]
        change = "" if before is None else _change(before, after)
        rows.append((stage, _milliseconds(before), _milliseconds(after), change))
    lines = [f"{'':20}  {'unpruned, SDPA':>14}  {'pruned':>12}"]
    lines += [f"{name:20}  {a:>14}  {b:>12}  {c:>7}".rstrip() for name, a, b, c in rows]
    return "\n".join(["", *lines, ""])


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


Answered = tuple[str, str, str, str]  # question, unpruned, pruned, right


def _table(rows: list[Answered]) -> str:
    if len(rows) == 1:
        _, unpruned, pruned, _ = rows[0]
        return f"unpruned: {unpruned}\npruned:   {pruned}"
    lines = [("", "unpruned", "pruned", "right" if rows[0][3] else ""), *rows]
    return "\n".join(f"{q:36}  {a:12}  {b:12}  {r}".rstrip() for q, a, b, r in lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 64, initial_indent="  ", subsequent_indent="  ")


def _beside(picture: Image.Image, rows: list[Answered]) -> Image.Image:
    """The picture with questions and answers at its right."""
    lines = [f"{question}\n{_wrapped(f'{a}  |  {b}')}" for question, a, b, _ in rows]
    text = "\n".join(["unpruned | pruned", "", *lines])
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(18)
    width = int(draw.multiline_textbbox((0, 0), text, font)[2]) + 40
    wide = Image.new("RGB", (picture.width + width, picture.height), "white")
    wide.paste(picture)
    ImageDraw.Draw(wide).multiline_text((picture.width + 20, 40), text, "black", font, spacing=8)
    return wide
