"""Draw scenes: `python -m bench.accuracy.pictures OUT`.

Writes `contact_sheet.jpg`, held-out scenes with questions and answers, and the scene and questions
of the demo: `scene.png` and `questions.json`, as in `examples/small_llava/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .questions import TYPES, ask
from .scenes import make_scene

DEMO_SEED = 2510  # its photo is CC0, so it may be redistributed


def contact_sheet(columns: int = 4, rows: int = 3, seed: int = 0) -> Image.Image:
    """The first held-out scenes, each above one question of every type."""
    side, text = 336, 15 * len(TYPES) + 12
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for index in range(columns * rows):
        scene = make_scene("test", index, seed=seed)
        left, top = index % columns * (side + 8), index // columns * (side + text)
        sheet.paste(Image.fromarray(scene.image), (left, top))
        asked = ask(scene, np.random.default_rng([seed, index, 11]), len(TYPES))
        lines = [f"{question.text} {question.answer}" for question in asked]
        draw.multiline_text((left + 4, top + side + 4), "\n".join(lines), "black")
    return sheet


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    contact_sheet().save(out / "contact_sheet.jpg", quality=88)
    scene = make_scene("test", 0, seed=DEMO_SEED)
    Image.fromarray(scene.image).save(out / "scene.png")
    asked = ask(scene, np.random.default_rng(DEMO_SEED), 2 * len(TYPES))
    answers = {question.text: question.answer for question in asked}
    (out / "questions.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
