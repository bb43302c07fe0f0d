"""Train the small LLaVA from scratch: `python -m bench.accuracy.train OUT --seed 0`.

First the vision tower learns to label patches, on windows of a scene that grow with its accuracy;
then the whole model also learns to answer, sixteen questions per image at once. An interrupted run
resumes from OUT/state.pt.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from . import small_llava
from .questions import BOS, EOS, TYPES, ask, encode
from .scenes import COLOURS, GLYPHS, NO_LABEL, TEXTURES, make_scene

QUESTIONS = 16


class Stage(NamedTuple):
    """A phase of the training; ends at `accuracy`, or after `minutes` (of 90 in total)."""

    name: str
    grid: int
    batch: int
    answers: bool  # whether the language model is trained too
    accuracy: float
    minutes: float
    rate: float
    final: bool = False  # whether the learning rate decays over the minutes


STAGES = (
    Stage("see 4x4", 4, 128, False, 0.94, 8, 4e-3),
    Stage("see 8x8", 8, 40, False, 0.94, 9, 3e-3),
    Stage("answer 8x8", 8, 40, True, 0.93, 12, 3e-3),
    Stage("answer 12x12", 12, 20, True, 0.94, 16, 2.5e-3),
    Stage("answer 24x24", 24, 8, True, 1.01, 45, 2.5e-3, final=True),
)


class Scenes(IterableDataset):
    """Endless batches of scenes for the current stage."""

    def __init__(self, seed: int, first: int, stage: object) -> None:
        self.seed, self.first, self.stage = seed, first, stage

    def __iter__(self) -> Iterator[tuple]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        index = self.first + worker
        while True:
            number = self.stage.value
            stage = STAGES[number]
            scenes = []
            while len(scenes) < stage.batch:
                scene = make_scene("train", index, stage.grid, self.seed + 1)
                index += workers
                if scene.objects:
                    scenes.append(scene)
            asked = None
            if stage.answers:
                rng = np.random.default_rng([self.seed, index, 7])
                asked = pack([ask(scene, rng, QUESTIONS) for scene in scenes])
            patches = torch.from_numpy(np.stack([s.patches for s in scenes])).flatten(2)
            pairs = torch.zeros(len(scenes), len(GLYPHS) * len(COLOURS))
            for row, scene in zip(pairs, scenes, strict=True):
                row[[o.glyph * len(COLOURS) + o.colour for o in scene.objects]] = 1
            images = torch.from_numpy(np.stack([s.image for s in scenes]))
            offsets = torch.tensor([s.offset for s in scenes])
            yield number, index, images, offsets, patches, pairs, asked


class Packed(NamedTuple):
    """Questions about a batch of images; the questions of one image share a row, after its patches.

    Attributes
    ----------
    ids : Tensor
        int64 `[B, L]`: words, answers and end-of-sentence tokens.
    position : Tensor
        int64 `[B, L]`: position of each token within its question.
    question : Tensor
        int64 `[B, L]`: which of the row's questions each belongs to, -1 for padding.
    type : Tensor
        int64 `[B, L]`: the question's type at the word before the answer, else -1.
    """

    ids: Tensor
    position: Tensor
    question: Tensor
    type: Tensor


def pack(asked: list[list]) -> Packed:
    """Pack the questions of each image into one row."""
    rows = []
    for questions in asked:
        row = []
        for number, question in enumerate(questions):
            words = [*encode(question.text), *encode(question.answer), EOS]
            kind = TYPES.index(question.type)
            for position, word in enumerate(words):
                row.append((word, position, number, kind if position == len(words) - 3 else -1))
        rows.append(row)
    length = max(map(len, rows))
    padded = [row + [(0, 0, -1, -1)] * (length - len(row)) for row in rows]
    return Packed(*torch.tensor(padded).permute(2, 0, 1))


class Trainee(nn.Module):
    """The model with the heads used only in training."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.llava = small_llava.build(seed)
        hidden = small_llava.HIDDEN
        sizes = (len(GLYPHS) + 1, len(COLOURS) + 1, len(TEXTURES) + 1, 2, 4)
        self.norm = nn.LayerNorm(hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in sizes)
        self.pairs = nn.Linear(hidden, len(GLYPHS) * len(COLOURS))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the layers, which halves the steps; AdamW for the rest."""
        layers = (small_llava.tower(self.llava).encoder, self.llava.model.language_model.layers)
        matrices = [p for part in layers for p in part.parameters() if p.dim() == 2]
        known = {id(p) for p in matrices}
        rest = [p for p in self.parameters() if id(p) not in known]
        return [
            torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
        ]

    def see(self, images: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features `[B, n, C]` of the layer that LLaVA uses, and the class token `[B, C]`."""
        tower = small_llava.tower(self.llava)
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - small_llava.MEAN) / small_llava.STD
        patches = tower.embeddings.patch_embedding(pixels)
        grid, steps = small_llava.GRID, torch.arange(patches.shape[2])
        rows, columns = offsets[:, :1] + steps, offsets[:, 1:] + steps
        place = (rows[:, :, None] * grid + columns[:, None]).flatten(1)
        position = tower.embeddings.position_embedding.weight
        hidden = patches.flatten(2).transpose(1, 2) + position[1:][place]
        cls = (tower.embeddings.class_embedding + position[0]).expand(len(hidden), 1, -1)
        hidden = tower.pre_layrnorm(torch.cat([cls, hidden], dim=1))
        for layer in tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
            hidden = hidden if isinstance(hidden, Tensor) else hidden[0]
        return hidden[:, 1:], tower.post_layernorm(hidden[:, 0])

    def vision_loss(
        self, features: Tensor, cls: Tensor, patches: Tensor, pairs: Tensor
    ) -> tuple[Tensor, float]:
        """The loss, and the share of object patches with the right glyph."""
        normed = self.norm(features)
        loss = features.new_zeros(())
        for number, (head, weight) in enumerate(
            zip(self.heads, (1.0, 0.5, 0.5, 0.5, 0.1), strict=True)
        ):
            logits, wanted = head(normed).flatten(0, 1), patches[:, number].flatten()
            balance = torch.ones(logits.shape[1])
            if number < 2:
                balance[-1] = 0.25  # most patches show no object
            loss = loss + weight * F.cross_entropy(logits, wanted, balance, ignore_index=NO_LABEL)
            if number == 0:
                shown = (wanted != NO_LABEL) & (wanted < len(GLYPHS))
                right = (logits.argmax(1) == wanted)[shown].float().mean().item()
        present = F.binary_cross_entropy_with_logits(self.pairs(cls), pairs)
        return loss + 2 * present, right

    def language_loss(self, features: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, which answers are right, and the types of the questions."""
        model = self.llava.model
        visual = model.multi_modal_projector(features)
        embed = model.get_input_embeddings()
        bos = embed(torch.full((len(visual), 1), BOS))
        embeddings = torch.cat([bos, visual, embed(packed.ids)], dim=1)
        before = embeddings.shape[1] - packed.ids.shape[1]
        front = torch.arange(before).expand(len(visual), -1)
        positions = torch.cat([front, packed.position + before], dim=1)
        # A word attends to the image and to the earlier words of its own question.
        number = torch.cat([torch.full_like(front, -2), packed.question], dim=1)
        causal = torch.ones(number.shape[1], number.shape[1], dtype=torch.bool).tril()
        seen = causal & ((number[:, :, None] == number[:, None]) | (number[:, None] == -2))
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        states = model.language_model(
            inputs_embeds=embeddings, position_ids=positions, attention_mask=mask[:, None],
            use_cache=False,
        ).last_hidden_state[:, before:]  # fmt: skip
        asks = packed.type >= 0
        after = asks.roll(1, dims=1)
        ends = after.roll(1, dims=1)
        logits = self.llava.lm_head(states[asks])
        answers = packed.ids[after]
        loss = F.cross_entropy(logits, answers)
        end_loss = F.cross_entropy(self.llava.lm_head(states[after]), packed.ids[ends])
        return loss + 0.3 * end_loss, logits.argmax(1) == answers, packed.type[asks]


def shuffled(features: Tensor) -> Tensor:
    """The patches of each image `[B, n, C]` in a random order.

    The language model then learns the place of a patch from its features. A model that only ever
    sees whole images of one size learns it from the index in the prompt instead, which pruning
    changes.
    """
    order = torch.rand(features.shape[:2]).argsort(dim=1)
    return features.gather(1, order[..., None].expand_as(features))


def train(out: Path, seed: int, minutes: float) -> None:
    """Train for `minutes` in total, resuming from the state in `out` if there is one."""
    out.mkdir(parents=True, exist_ok=True)
    trainee = Trainee(seed)
    optimizers = trainee.optimizers()
    run = {"seed": seed, "minutes": minutes}
    done = {"stage": 0, "step": 0, "index": 0, "in_stage": 0.0, "total": 0.0, "smooth": 0.0}
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt")
        if state["run"] != run:
            raise ValueError(f"OUT must be empty or hold a run of {run}, got one of {state['run']}")
        if state["finished"]:
            print(f"Finished: {out / 'checkpoint'}")
            return
        trainee.load_state_dict(state["trainee"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        done = state["done"]
    torch.manual_seed(seed + done["step"])
    current = multiprocessing.get_context("fork").Value("i", done["stage"])
    loader = DataLoader(
        Scenes(seed, done["index"], current), batch_size=None, num_workers=1, prefetch_factor=4,
        worker_init_fn=lambda _: torch.set_num_threads(1), multiprocessing_context="fork",
    )  # fmt: skip
    log = (out / "log.csv").open("a", newline="")
    writer = csv.writer(log)
    if log.tell() == 0:
        writer.writerow(["minutes", "stage", "step", "loss", "accuracy", "glyphs", *TYPES])
    pace = minutes / sum(stage.minutes for stage in STAGES)
    bar = tqdm(total=round(minutes * 60), initial=round(done["total"]), unit="s")
    last, saved, seen = time.perf_counter(), 0.0, 0.0
    by_type = torch.full((len(TYPES),), float("nan"))
    for number, index, images, offsets, patches, pairs, asked in loader:
        if number != done["stage"]:
            continue  # prepared for the previous stage
        stage = STAGES[number]
        rate = stage.rate * min(1.0, (done["step"] + 1) / 200)
        if stage.final:
            rate *= max(0.02, 1 - done["in_stage"] / 60 / (pace * stage.minutes))
        for optimizer, most in zip(optimizers, (1.0, 0.4), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = most * rate
        features, cls = trainee.see(images, offsets)
        loss, right = trainee.vision_loss(features, cls, patches, pairs)
        seen = right if seen == 0 else 0.98 * seen + 0.02 * right
        if stage.answers:
            answer_loss, answers, kinds = trainee.language_loss(shuffled(features), Packed(*asked))
            loss = answer_loss + loss
            right = answers.float().mean().item()
            for kind in range(len(TYPES)):
                if (kinds == kind).any():
                    share = answers[kinds == kind].float().mean()
                    old = by_type[kind]
                    by_type[kind] = share if old.isnan() else old * 0.98 + share * 0.02
        trainee.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

        now = time.perf_counter()
        for key in ("in_stage", "total"):
            done[key] += min(now - last, 30.0)  # not the time that a process was suspended
        last = now
        done["step"] += 1
        done["index"] = index
        done["smooth"] = right if done["smooth"] == 0 else 0.98 * done["smooth"] + 0.02 * right
        bar.n = round(done["total"])
        if done["step"] % 20 == 0:
            figures = [f"{loss.item():.3f}", f"{done['smooth']:.3f}", f"{seen:.3f}"]
            figures += [f"{share:.3f}" for share in by_type]
            writer.writerow([f"{done['total'] / 60:.2f}", stage.name, done["step"], *figures])
            log.flush()
            bar.set_description(f"{stage.name} {done['smooth']:.3f}")
        over = done["smooth"] > stage.accuracy or done["in_stage"] > pace * stage.minutes * 60
        if over and number + 1 < len(STAGES):
            current.value = done["stage"] = number + 1
            done["in_stage"] = done["smooth"] = 0.0
        finished = done["total"] > minutes * 60 or (over and number + 1 == len(STAGES))
        if finished or over or now - saved > 120:
            saved = now
            if finished:
                small_llava.save(trainee.llava, out / "checkpoint")
            state = {
                "run": run, "done": done, "finished": finished,
                "trainee": trainee.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
            }  # fmt: skip
            torch.save(state, out / "state.tmp")
            (out / "state.tmp").replace(out / "state.pt")
        if finished:
            break
    bar.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {arguments.minutes}")
    try:
        train(arguments.out, arguments.seed, arguments.minutes)
    except ValueError as error:
        parser.error(str(error))
