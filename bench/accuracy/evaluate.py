"""Accuracy over budgets: `python -m bench.accuracy.evaluate --model DIR [DIR ...] --out FOLDER`.

Every method answers the same questions about the same held-out scenes. Writes `curve.csv`
(accuracies), `paired.csv` (differences, with intervals and p-values) and `curve.png`.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import hivtp_transformers
import numpy as np
import torch
from hivtp_transformers.towers import default_layers
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from hivtp_kernels import PruneConfig

from .answer import answer
from .checkpoints import SMALL_LLAVA, check_device, llava_config
from .questions import ANSWERS, TYPES, Question, ask
from .scenes import Scene, make_scene

QUESTIONS = 16  # per image
BUDGETS = (288, 192, 128, 64, 32)
SMALL = (128, 64)  # budgets at which layers, regions and windows are varied
WINDOWS = (3, 4, 6, 8)
NUMBERS = {"no": "0", "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3"}

Asked = list[tuple[Scene, list[Question]]]


class Setting(NamedTuple):
    """How a model is pruned, in the terms of `hivtp_transformers.apply`.

    Two settings do not prune: "full" is the untouched model, "background" shows it the scene
    without objects, which measures what can be guessed from the questions and the background.
    """

    method: str = "full"
    rows: str = ""
    layers: tuple[int, ...] = ()
    budget: int = 0
    regions: int = 2
    window: int = 0  # 0: chosen by the budget

    def apply(self, model: Any) -> AbstractContextManager:
        """A context in which `model` is pruned."""
        if not self.budget:
            return nullcontext()
        options: dict[str, Any] = {"layers": self.layers, "rows": self.rows}
        if self.method in ("random", "uniform"):
            options = {}  # they read no attention
        if self.method != "hivtp":
            return hivtp_transformers.apply(
                model, budget=self.budget, method=self.method, **options
            )
        config = PruneConfig(
            grid=grid_of(model.config),
            regions=(self.regions, self.regions),
            window=(self.window, self.window) if self.window else None,
            budget=self.budget,
        )
        return hivtp_transformers.apply(model, config, **options)


def grid_of(config: Any) -> tuple[int, int]:
    """Height and width of the patch grid."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side


def curve(config: Any) -> list[Setting]:
    """Every method at every budget below the number of patches."""
    middle = default_layers(config.vision_config.num_hidden_layers)
    found = [Setting(), Setting("background")]
    for budget in [budget for budget in BUDGETS if budget < math.prod(grid_of(config))]:
        for method in ("hivtp", "topk"):
            found += [Setting(method, rows, middle, budget) for rows in ("cls", "all")]
        found += [Setting(method, "cls", middle, budget) for method in ("uniform", "random")]
    return found


def variations(config: Any) -> list[Setting]:
    """Single layers, up to the one that the features come from; then regions and windows."""
    layers, grid = config.vision_config.num_hidden_layers, grid_of(config)
    middle, depth = default_layers(layers), range(layers + 1)[config.vision_feature_layer]
    found = []
    for budget in SMALL:
        for layer in dict.fromkeys((layers // 4, layers // 3, layers // 2, depth - 1)):
            for method in ("hivtp", "topk"):
                found += [Setting(method, rows, (layer,), budget) for rows in ("cls", "all")]
        hivtp = Setting("hivtp", "cls", middle, budget)
        found += [hivtp._replace(regions=regions) for regions in (1, 3, 4)]
        chosen = PruneConfig(grid=grid, budget=budget).window
        for window in WINDOWS:
            fits = math.prod(math.ceil(side / window) for side in grid) <= budget
            if fits and (window, window) != chosen:
                found.append(hivtp._replace(window=window))
    return found


@lru_cache(maxsize=1)
def held_out(count: int, seed: int) -> Asked:
    """Held-out scenes with their questions."""
    scenes = [make_scene("test", index, seed=seed) for index in range(count)]
    return [
        (scene, ask(scene, np.random.default_rng([seed, index, 11]), QUESTIONS))
        for index, scene in enumerate(scenes)
    ]


def evaluate(
    model: Any, processor: Any, setting: Setting, asked: Asked, template: str
) -> np.ndarray:
    """Whether each answer is right: bool `[images, questions]`."""
    right = []
    with setting.apply(model):
        for scene, questions in asked:
            shown = Image.fromarray(
                scene.background if setting.method == "background" else scene.image
            )
            said = answer(model, processor, shown, questions, template)
            pairs = zip(said, questions, strict=True)
            right.append(
                [choice(words, question.type) == question.answer for words, question in pairs]
            )
    return np.array(right)


def choice(text: str, kind: str) -> str:
    """The legal answer that `text` names first, for a question of type `kind`; "" if there is none.

    "Top left." is top-left, "Two letters" is 2, "The letter is Z" is Z.
    """
    words = re.findall(r"\w+", text if kind == "identity" else text.lower())
    if kind == "count":
        words = [NUMBERS.get(word, word) for word in words]
    said = f" {' '.join(words)} "
    found = {said.find(f" {legal.replace('-', ' ')} "): legal for legal in ANSWERS[kind]}
    return found[min(at for at in found if at >= 0)] if max(found) >= 0 else ""


def chance(asked: Asked) -> list[float]:
    """The share of the most frequent answer, for each type of question."""
    questions = [question for _, some in asked for question in some]
    answers = [[q.answer for q in questions if q.type == kind] for kind in TYPES]
    return [max(Counter(some).values(), default=0) / max(len(some), 1) for some in answers]


def interval(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of `differences`, one per image."""
    rng = np.random.default_rng(seed)
    drawn = differences[rng.integers(len(differences), size=(4000, len(differences)))].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of `differences`, one per image, from 10,000 random sign flips."""
    rng = np.random.default_rng(seed)
    flips = rng.choice([-1.0, 1.0], size=(10000, len(differences))) @ differences
    as_far = np.abs(flips) >= abs(differences.sum()) - 1e-9
    return float((1 + as_far.sum()) / (1 + len(flips)))


def opponents(setting: Setting, middle: tuple[int, ...]) -> list[Setting]:
    """The settings that a setting is compared with: unpruned, and others at the same budget.

    The others are the methods without scores, `topk` by the same scores, and the method itself with
    the defaults of `curve`: scores of the `middle` layers, default regions and windows.
    """
    if not setting.budget:
        return []
    usual = Setting(setting.method, setting.rows, middle, setting.budget)
    others = [usual._replace(method=method, rows="cls") for method in ("random", "uniform")]
    if setting.method == "hivtp":
        others.append(usual._replace(method="topk", layers=setting.layers))
    return [Setting(), *(other for other in (*others, usual) if other != setting)]


def write_curve(path: Path, models: list[str], settings: list[Setting], right: np.ndarray,
                asked: Asked) -> None:  # fmt: skip
    """Write one line per model and setting, and one per setting over all models.

    `right` is `[models, settings, images, questions]`.
    """
    kinds = np.array([[TYPES.index(q.type) for q in questions] for _, questions in asked])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", *Setting._fields, "accuracy", *TYPES])
        floor = chance(asked)
        shares = np.bincount(kinds.ravel(), minlength=len(TYPES)) / kinds.size
        figures = [float(shares @ floor), *floor]
        writer.writerow(["", *Setting("chance"), *(f"{figure:.4f}" for figure in figures)])
        together = [("all", right)] if len(models) > 1 else []
        each = [(name, right[i : i + 1]) for i, name in enumerate(models)]
        for name, answers in together + each:
            for row, setting in enumerate(settings):
                by_type = [answers[:, row, kinds == kind].mean() for kind in range(len(TYPES))]
                figures = [answers[:, row].mean(), *by_type]
                writer.writerow([name, *setting, *(f"{figure:.4f}" for figure in figures)])


def write_paired(path: Path, settings: list[Setting], right: np.ndarray) -> None:
    """Write one line per comparison, paired by image: answers about one image are correlated."""
    by_model = right.mean(-1)  # [models, settings, images]
    by_image = by_model.mean(0)
    middle = next(setting.layers for setting in settings if setting.budget)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        against = ("against", "against_rows", "against_layers")
        figures = ("difference", "low", "high", "p", "models_ahead")
        writer.writerow([*Setting._fields, *against, *figures])
        for row, setting in enumerate(settings):
            for other in opponents(setting, middle):
                column = settings.index(other)
                difference = by_image[row] - by_image[column]
                figures = (difference.mean(), *interval(difference), sign_flip_p(difference))
                ahead = (by_model[:, row].mean(-1) > by_model[:, column].mean(-1)).sum()
                said = [*(f"{figure:.4f}" for figure in figures), ahead]
                writer.writerow([*setting, other.method, other.rows, other.layers, *said])


def draw(path: Path, settings: list[Setting], right: np.ndarray) -> None:
    """Plot accuracy over budgets for the settings of `curve`, one line per method."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    accuracy = {s: float(a) for s, a in zip(settings, right.mean((0, 2, 3)), strict=True)}
    middle = next(setting.layers for setting in settings if setting.budget)
    usual = [s for s in settings if s == Setting(s.method, s.rows, middle, s.budget)]
    for method, rows in dict.fromkeys(setting[:2] for setting in usual):
        points = sorted((s.budget, accuracy[s]) for s in usual if s[:2] == (method, rows))
        label = f"{method}, rows={rows}" if method in ("hivtp", "topk") else method
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(accuracy[Setting()], color="black", linewidth=1, label="unpruned")
    axes.axhline(accuracy[Setting("background")], color="grey", linestyle=":", label="no objects")
    axes.set(xscale="log", xlabel="visual tokens kept", ylabel="accuracy")
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _share_cores(jobs: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _work(task: tuple[str, Setting, argparse.Namespace]) -> np.ndarray:
    name, setting, arguments = task
    model, processor = _load(name, arguments.device)
    asked = held_out(arguments.images, arguments.seed)
    return evaluate(model, processor, setting, asked, arguments.template)


@lru_cache(maxsize=1)
def _load(name: str, device: str) -> tuple[Any, Any]:
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    return model.eval().to(device), AutoProcessor.from_pretrained(name)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", nargs="+", default=[str(SMALL_LLAVA)], help="directories or Hub ids of LLaVA-1.5"
    )
    parser.add_argument("--out", type=Path, default=Path("bench_out"))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument(
        "--what", choices=("unpruned", "curve", "all"), default="all",
        help="unpruned: with chance and background; curve: also methods by budgets; all: also "
        "layers, regions and windows",
    )  # fmt: skip
    parser.add_argument("--template", default="<image> {question}", help="the prompt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its own model")
    arguments = parser.parse_args()
    try:
        settings = _check(arguments)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    tasks = [(name, setting, arguments) for name in arguments.model for setting in settings]
    with ProcessPoolExecutor(
        arguments.jobs, get_context("spawn"), _share_cores, (arguments.jobs,)
    ) as pool:
        answers = list(tqdm(pool.map(_work, tasks), total=len(tasks), unit="setting"))
    right = np.stack(answers).reshape(len(arguments.model), len(settings), *answers[0].shape)
    asked = held_out(arguments.images, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_curve(arguments.out / "curve.csv", arguments.model, settings, right, asked)
    print((arguments.out / "curve.csv").read_text())
    if arguments.what != "unpruned":
        write_paired(arguments.out / "paired.csv", settings, right)
        draw(arguments.out / "curve.png", settings, right)


def _check(arguments: argparse.Namespace) -> list[Setting]:
    """The chosen settings; a ValueError that names the argument if one is illegal."""
    for name in ("images", "jobs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    template = arguments.template
    front, image, after = template.partition("<image>")
    try:
        asks = after.format(question="QUESTION", choices="") if image else ""
        legal = "QUESTION" in asks and "<image>" not in asks and front.format() == front
    except (IndexError, KeyError, ValueError):
        legal = False
    if not legal:
        raise ValueError(
            "--template must hold <image> once and, after it, {question} and perhaps {choices}, "
            f"got {template!r}"
        )
    check_device(arguments.device)
    per_model = []
    for name in arguments.model:
        config = llava_config(name)
        settings = curve(config)
        if arguments.what == "unpruned":
            settings = settings[:2]
        elif arguments.what == "all":
            settings += variations(config)
        per_model.append(settings)
    if any(settings != per_model[0] for settings in per_model):
        raise ValueError(f"--model must be checkpoints of one architecture, got {arguments.model}")
    return per_model[0]


if __name__ == "__main__":
    main()
