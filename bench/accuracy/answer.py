"""Ask a LLaVA many questions about one image, which is encoded and prefilled once."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from .questions import ANSWERS, Question


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    image: Image.Image,
    questions: list[Question],
    template: str,
    max_new_tokens: int = 8,
) -> list[str]:
    """Greedy answers, the same as from `generate` for each question alone.

    `template` contains `<image>` and, after it, `{question}`; `{choices}` are the legal answers.
    The prompt up to the image is prefilled once, and all questions continue from its cache.
    """
    front = template.partition("<image>")[0]
    inputs = processor(images=image, text=f"{front}<image>", return_tensors="pt").to(model.device)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    read = cache.get_seq_length()
    cache.batch_repeat_interleave(len(questions))

    tokenizer = processor.tokenizer
    texts = [
        template.format(question=question.text, choices=", ".join(ANSWERS[question.type]))
        for question in questions
    ]
    # Tokenize whole prompts: some tokenizers treat the first word of a text differently.
    whole = [tokenizer(text)["input_ids"] for text in texts]
    rows = [row[row.index(processor.image_token_id) + 1 :] for row in whole]
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    padding = torch.arange(length, device=model.device) < (length - lengths)[:, None]
    mask = torch.cat([padding.new_ones(len(rows), read), ~padding], dim=1).long()
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, read:]
    stop = set(_stops(model))
    said: list[torch.Tensor] = []
    done = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    for _ in range(max_new_tokens):
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        token = out.logits[:, -1].argmax(-1)
        said.append(token)
        done |= torch.tensor([int(t) in stop for t in token], device=model.device)
        if done.all():
            break
        ids, position = token[:, None], position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return [_text(tokenizer, row, stop) for row in torch.stack(said, dim=1).tolist()]


def _stops(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]


def _text(tokenizer: Any, tokens: list[int], stop: set[int]) -> str:
    kept = []
    for token in tokens:
        if token in stop:
            break
        kept.append(token)
    return tokenizer.decode(kept, skip_special_tokens=True).strip()
