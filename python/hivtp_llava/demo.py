"""The demo: one photo through LLaVA-1.5, unpruned and pruned, timed and drawn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps
from skimage import data
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from . import families
from .apply import apply
from .handle import Handle
from .handover import hand_over
from .vision import inner

QUESTION = "Describe this photo in one sentence."
ROUNDS, SECONDS = 7, 20.0  # timed rounds, and when to stop after the third on a busy machine
DECODED, ANSWER = 16, 48  # tokens decoded in a round, and in an answer
SEED = 2509
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
    picture = _open(photo)
    place = _device(device)
    out.mkdir(parents=True, exist_ok=True)
    if model_id is None:
        print(f"Model: LLaVA-1.5 in small, weights seeded with {SEED}. Its answer means nothing.")
        model, processor = seeded_llava()
        inputs = _seeded_inputs(model, processor, picture)
    else:
        model, processor = _load(model_id)
        inputs = _ask(processor, picture)
    model.eval().to(place)
    inputs = {name: value.to(place) for name, value in inputs.items()}

    def pruned(**options: Any) -> Handle:
        return apply(model, budget=budget, **options)

    with pruned() as handle:
        if handle.compact(**inputs).get("pixel_values") is not None:
            raise ValueError(f"--budget must be less than all patches to prune, got {budget}")
        assert handle.stats is not None
        tokens, kept = handle.stats.kept[0], handle.overlay(picture)

    if place.type == "cpu":
        print(f"Threads: {_settle_threads(model, inputs)}, the faster of all and one.")
    times = _rounds(model, inputs, pruned)
    print(_table(times, inputs, model.config.image_token_id, tokens))
    if model_id is not None:
        for name, answer in _answers(model, processor, inputs, pruned).items():
            print(f"{name:9} {answer}")

    kept.save(out / "overlay.png")
    print(f"Picture: {out / 'overlay.png'}")


def seeded_llava() -> tuple[Any, Any]:
    """A LLaVA-1.5 with its 24 x 24 grid, small enough for a CPU, and its image processor."""
    torch.manual_seed(SEED)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=24,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=2048,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        eos_token_id=None,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2000)
    model = LlavaForConditionalGeneration(config)
    tower = inner(model.model.vision_tower)
    with torch.no_grad():
        # Untrained attention is next to even: let what a patch shows decide where it goes.
        tower.embeddings.position_embedding.weight.mul_(0.2)
        tower.embeddings.patch_embedding.weight.mul_(4)
        for layer in tower.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(4)
            layer.self_attn.k_proj.weight.mul_(4)
    from transformers import CLIPImageProcessor  # looking for torchvision, it talks when imported

    side = vision.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return model, processor


def _open(photo: str | None) -> Image.Image:
    if photo is None:
        return Image.fromarray(data.astronaut())
    try:
        with Image.open(photo) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"PHOTO must be an image that Pillow reads, got {photo!r}: {error}"
        ) from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device must be one that torch can use here, got {name!r}: {reason}"
        ) from error
    return device


def _load(model_id: str) -> tuple[Any, Any]:
    try:
        model_type = AutoConfig.from_pretrained(model_id).model_type
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--model must be a checkpoint's directory or Hub id, got {model_id!r}: {reason}"
        ) from error
    if model_type != "llava":
        raise ValueError(f"--model must be of type llava, got {model_type!r}")
    model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto")
    return model, AutoProcessor.from_pretrained(model_id)


def _seeded_inputs(model: Any, processor: Any, picture: Image.Image) -> dict[str, torch.Tensor]:
    """No tokenizer comes with seeded weights: 60 tokens of noise stand for the question."""
    patches = families.adapt(model).grid
    text = torch.randint(3, model.config.image_token_id, (60,))
    image = torch.full((patches[0] * patches[1],), model.config.image_token_id)
    ids = torch.cat([text[:35], image, text[35:]])[None]
    pixel_values = processor(images=picture, return_tensors="pt")["pixel_values"]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixel_values,
    }


def _ask(processor: Any, picture: Image.Image) -> dict[str, torch.Tensor]:
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        conversation = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=False
        )
    else:
        text = f"USER: <image>\n{QUESTION} ASSISTANT:"
    return dict(processor(images=picture, text=text, return_tensors="pt"))


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


def _table(
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


def _answers(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], pruned: Callable[..., Handle]
) -> dict[str, str]:
    def answer() -> str:
        out = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return processor.decode(new, skip_special_tokens=True).strip()

    answers = {"unpruned:": answer()}
    with pruned():
        answers["pruned:"] = answer()
    return answers
