"""Questions about a scene, with one-word answers, and their vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .scenes import COLOURS, GLYPHS, MOST_ALIKE, PHOTO, QUADRANTS, TEXTURES, Scene

TYPES = ("existence", "colour", "identity", "place", "count", "background")
PLACES = tuple(name.replace(" ", "-") for name in QUADRANTS)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_WORDS = "is there a which colour the letter where how many are what lies ? yes no".split()
COUNTS = tuple(str(n) for n in range(MOST_ALIKE + 1))
VOCABULARY = tuple(
    dict.fromkeys((*SPECIAL, *_WORDS, *GLYPHS, *COLOURS, *TEXTURES, PHOTO, *PLACES, *COUNTS))
)
ANSWERS = {  # the legal answers, by type
    "existence": ("yes", "no"),
    "colour": tuple(COLOURS),
    "identity": GLYPHS,
    "place": PLACES,
    "count": COUNTS,
    "background": (*TEXTURES, PHOTO),
}
PAD, BOS, EOS, _, IMAGE = range(5)
_IDS = {word: number for number, word in enumerate(VOCABULARY)}


class Question(NamedTuple):
    """A question and its one-word answer."""

    type: str
    text: str
    answer: str


def encode(text: str) -> list[int]:
    """Token ids of words separated by spaces."""
    return [_IDS[word] for word in text.split()]


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` questions that cycle through the types the scene allows; some may repeat."""
    questions: list[Question] = []
    turn = int(rng.integers(len(TYPES)))
    while len(questions) < count:
        question = _ASK[TYPES[turn % len(TYPES)]](scene, rng)
        turn += 1
        if question is not None:
            questions.append(question)
    return questions


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    pairs = {(o.glyph, o.colour) for o in scene.objects}
    if rng.random() < 0.5:
        glyph, colour = list(pairs)[rng.integers(len(pairs))]
        answer = "yes"
    else:
        # A glyph and a colour that are both in the scene, but not together.
        glyph = scene.objects[rng.integers(len(scene.objects))].glyph
        colour = scene.objects[rng.integers(len(scene.objects))].colour
        if rng.random() < 0.5 or len(pairs) == 1:
            glyph = int(rng.integers(len(GLYPHS)))
        if (glyph, colour) in pairs:
            return None
        answer = "no"
    return Question("existence", f"is there a {_colour(colour)} {GLYPHS[glyph]} ?", answer)


def _colour_of(scene: Scene, rng: np.random.Generator) -> Question | None:
    chosen = _only(scene, rng, "glyph")
    if chosen is None:
        return None
    text = f"which colour is the {GLYPHS[chosen.glyph]} ?"
    return Question("colour", text, _colour(chosen.colour))


def _identity(scene: Scene, rng: np.random.Generator) -> Question | None:
    chosen = _only(scene, rng, "colour")
    if chosen is None:
        return None
    text = f"which letter is {_colour(chosen.colour)} ?"
    return Question("identity", text, GLYPHS[chosen.glyph])


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    pairs = [(o.glyph, o.colour) for o in scene.objects]
    single = [i for i, pair in enumerate(pairs) if pairs.count(pair) == 1]
    if not single:
        return None
    chosen = single[rng.integers(len(single))]
    glyph, colour = pairs[chosen]
    place = PLACES[scene.quadrants[chosen]]
    return Question("place", f"where is the {_colour(colour)} {GLYPHS[glyph]} ?", place)


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    present = {o.colour for o in scene.objects}
    colour = int(rng.integers(len(COLOURS)))
    if rng.random() < 0.7:
        colour = list(present)[rng.integers(len(present))]
    number = sum(o.colour == colour for o in scene.objects)
    return Question("count", f"how many are {_colour(colour)} ?", str(number))


def _background(scene: Scene, rng: np.random.Generator) -> Question | None:
    quadrant = int(rng.integers(4))
    if scene.panels[quadrant] < 0:
        return None
    answer = ANSWERS["background"][scene.panels[quadrant]]
    return Question("background", f"what lies {PLACES[quadrant]} ?", answer)


_ASK = dict(
    zip(TYPES, (_existence, _colour_of, _identity, _place, _count, _background), strict=True)
)


def _only(scene: Scene, rng: np.random.Generator, key: str):
    """An object whose glyph (or colour) no other object shares, or None."""
    values = [getattr(o, key) for o in scene.objects]
    single = [o for o, value in zip(scene.objects, values, strict=True) if values.count(value) == 1]
    return single[rng.integers(len(single))] if single else None


def _colour(number: int) -> str:
    return tuple(COLOURS)[number]
