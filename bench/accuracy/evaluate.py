"""Accuracy over budgets: `python -m bench.accuracy.evaluate --model DIR --out FOLDER`.

Every method answers the same questions about the same scenes, none of which training saw. Writes
`answers.npz` (right or wrong, by setting, image and question) and `curve.csv`.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import hivtp_llava
from hivtp_kernels import PruneConfig

from .answer import answer
from .questions import TYPES, Question, ask
from .scenes import Scene, make_scene

QUESTIONS = 16
BUDGETS = (288, 192, 128, 64, 32)


class Setting(NamedTuple):
    """What `hivtp_llava.apply` is told. No budget: unpruned."""

    method: str = "full"
    rows: str = "cls"
    layers: tuple[int, ...] = ()
    budget: int = 576
    regions: tuple[int, int] = (2, 2)
    window: int = 0  # 0: by the budget

    def apply(self, model: Any) -> hivtp_llava.Handle | None:
        """Prune `model`, None where nothing is to be pruned."""
        if self.method == "full":
            return None
        options: dict[str, Any] = {"layers": self.layers, "rows": self.rows}
        if self.method != "hivtp":
            return hivtp_llava.apply(model, budget=self.budget, method=self.method, **options)
        window = (self.window, self.window) if self.window else None
        config = PruneConfig(
            grid=(24, 24), regions=self.regions, window=window, budget=self.budget
        )
        return hivtp_llava.apply(model, config, **options)


def settings(depth: int, quick: bool = False) -> list[Setting]:
    """The curve: methods by budgets, then layers, regions and windows at two budgets."""
    middle = (depth // 3, depth // 3 + 1)
    found = [Setting()]
    for budget in BUDGETS:
        for method in ("hivtp", "topk"):
            found += [Setting(method, rows, middle, budget) for rows in ("cls", "all")]
        found += [Setting(method, "cls", middle, budget) for method in ("uniform", "random")]
    if quick:
        return found
    places = sorted({round(depth / 4), round(depth / 3), round(depth / 2), depth - 1})
    for budget in (128, 64):
        for layer in places:
            found += [
                Setting(method, rows, (layer,), budget)
                for method in ("hivtp", "topk")
                for rows in ("cls", "all")
            ]
        found += [
            Setting("hivtp", "cls", middle, budget, regions=(n, n)) for n in (1, 3, 4)
        ]
        found += [
            Setting("hivtp", "cls", middle, budget, window=window)
            for window in (3, 4, 6, 8)
            if (-(-24 // window)) ** 2 <= budget
        ]
    return list(dict.fromkeys(found))


def scenes(count: int, seed: int) -> Iterator[tuple[Scene, list[Question]]]:
    """Held-out scenes with their questions."""
    for index in range(count):
        scene = make_scene("test", index, seed=seed)
        yield scene, ask(scene, np.random.default_rng([seed, index, 11]), QUESTIONS)


def evaluate(
    model: Any, processor: Any, found: list[Setting], asked: list, template: str
) -> np.ndarray:
    """Whether each answer is right: bool `[settings, images, questions]`."""
    right = np.zeros((len(found), len(asked), QUESTIONS), dtype=bool)
    with tqdm(total=len(found) * len(asked), unit="image") as bar:
        for row, setting in enumerate(found):
            bar.set_description(f"{setting.method} {setting.budget}")
            handle = setting.apply(model)
            for column, (scene, questions) in enumerate(asked):
                image = Image.fromarray(scene.image)
                texts = [question.text for question in questions]
                said = answer(model, processor, handle, image, texts, template)
                wanted = [question.answer for question in questions]
                right[row, column] = [
                    first_word(a) == b.lower() for a, b in zip(said, wanted, strict=True)
                ]
                bar.update()
            if handle is not None:
                handle.remove()
    return right


def first_word(text: str) -> str:
    """What an answer starts with, as questions want it."""
    words = text.lower().replace(".", " ").replace(",", " ").split()
    return words[0] if words else ""


def interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over images, whose questions belong together."""
    rng = np.random.default_rng(seed)
    means = differences.mean(-1)
    drawn = means[rng.integers(len(means), size=(4000, len(means)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided paired p-value over images, by flipping the signs of their differences."""
    rng = np.random.default_rng(seed)
    means = differences.mean(-1)
    flips = rng.choice([-1.0, 1.0], size=(10000, len(means))) @ means / len(means)
    return float((1 + (np.abs(flips) >= abs(means.mean()) - 1e-12).sum()) / (1 + len(flips)))


def write_csv(path: Path, found: list[Setting], right: np.ndarray, asked: list) -> None:
    """A line a setting: accuracy, its difference from unpruned, and each type's accuracy."""
    kinds = np.array([[TYPES.index(q.type) for q in questions] for _, questions in asked])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [*Setting._fields, "accuracy", "minus_full", "low", "high", "p", *TYPES]
        )
        for setting, row in zip(found, right, strict=True):
            difference = row.astype(float) - right[0]
            low, high = interval(difference)
            by_type = [row[kinds == kind].mean() for kind in range(len(TYPES))]
            figures = [row.mean(), difference.mean(), low, high, sign_flip_p(difference), *by_type]
            writer.writerow([*setting, *(f"{figure:.4f}" for figure in figures)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or Hub id of a LLaVA-1.5")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--quick", action="store_true", help="methods and budgets only")
    parser.add_argument("--full-only", action="store_true", help="unpruned only")
    parser.add_argument("--template", default="<image> {question}")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model, dtype=torch.float32 if arguments.device == "cpu" else "auto"
    )
    model = model.eval().to(arguments.device)
    processor = AutoProcessor.from_pretrained(arguments.model)
    vision = model.config.vision_config
    layer = model.config.vision_feature_layer
    depth = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    found = [Setting()] if arguments.full_only else settings(depth, arguments.quick)
    asked = list(scenes(arguments.images, arguments.seed))
    right = evaluate(model, processor, found, asked, arguments.template)
    arguments.out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        arguments.out / "answers.npz", right=right, settings=np.array([str(s) for s in found])
    )
    write_csv(arguments.out / "curve.csv", found, right, asked)
    print((arguments.out / "curve.csv").read_text())


if __name__ == "__main__":
    main()
