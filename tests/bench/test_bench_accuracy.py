"""The accuracy bench: its questions, training and statistics, and the trained checkpoints."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

from bench.accuracy import evaluate, scenes, small_llava, train
from bench.accuracy.answer import answer
from bench.accuracy.checkpoints import SMALL_LLAVA
from bench.accuracy.questions import COUNTS, PLACES, TYPES, VOCABULARY, ask
from bench.accuracy.scenes import (
    COLOURS,
    GLYPHS,
    GRID,
    NO_LABEL,
    PATCH,
    PHOTO,
    TEXTURES,
    make_scene,
)
from hivtp_kernels import PruneConfig


def reply(scene, words):
    """The answer to a question, from its text and the objects of the scene."""
    things = [
        (GLYPHS[o.glyph], tuple(COLOURS)[o.colour], PLACES[2 * (o.y > 168) + (o.x > 168)])
        for o in scene.objects
    ]
    match words.split():
        case ["is", "there", "a", colour, glyph, "?"]:
            return "yes" if (glyph, colour) in [t[:2] for t in things] else "no"
        case ["which", "colour", "is", "the", glyph, "?"]:
            (found,) = [t[1] for t in things if t[0] == glyph]
        case ["which", "letter", "is", colour, "?"]:
            (found,) = [t[0] for t in things if t[1] == colour]
        case ["where", "is", "the", colour, glyph, "?"]:
            (found,) = [t[2] for t in things if t[:2] == (glyph, colour)]
        case ["how", "many", "are", colour, "?"]:
            found = str(sum(t[1] == colour for t in things))
        case ["what", "lies", place, "?"]:
            found = (*TEXTURES, PHOTO)[scene.panels[PLACES.index(place)]]
    return found


def test_answers_are_right_and_their_words_known():
    seen = set()
    for index in range(60):
        scene = make_scene("train", index)
        for question in ask(scene, np.random.default_rng(index), 12):
            assert reply(scene, question.text) == question.answer
            assert {*question.text.split(), question.answer} <= {*VOCABULARY}
            seen.add((question.type, question.answer))
    by_type = {kind: {answer for t, answer in seen if t == kind} for kind in TYPES}
    assert by_type["existence"] == {"yes", "no"} and by_type["place"] == {*PLACES}
    assert by_type["background"] == {*TEXTURES, PHOTO} and by_type["colour"] == {*COLOURS}
    assert {"0", "1", "2"} < by_type["count"] <= {*COUNTS}


def test_scenes():
    first, again = make_scene("test", 3), make_scene("test", 3)
    assert (first.image == again.image).all() and first.objects == again.objects
    assert first.objects != make_scene("train", 3).objects
    sizes = [o.size for i in range(40) for o in make_scene("train", i).objects]
    assert 16 <= min(sizes) < 20 and 52 < max(sizes) <= 56
    changed = (first.image != first.background).any(-1)
    drawn = np.zeros_like(changed)
    for o in first.objects:
        assert np.abs(np.array([o.x, o.y]) % PATCH / PATCH - 0.5).max() <= 0.25
        box = [slice(max(int(c - o.size / 2) - 1, 0), int(c + o.size / 2) + 2) for c in (o.y, o.x)]
        assert changed[tuple(box)].any()
        drawn[tuple(box)] = True
    assert not changed[~drawn].any(), "the background is the scene without its objects"


def test_held_out_scenes_share_no_photo_and_no_font(monkeypatch):
    photo, glyph = scenes._photo, scenes._glyph
    seen = {}
    for split in ("train", "test"):
        used = seen[split] = set()
        with monkeypatch.context() as patch:
            patch.setattr(scenes, "_photo", lambda n, used=used: used.add(n) or photo(n))
            patch.setattr(
                scenes, "_glyph", lambda g, f, w, used=used: used.add(f) or glyph(g, f, w)
            )
            for index in range(80):
                make_scene(split, index)
    assert seen["train"] & seen["test"] == {"brick", "grass", "gravel"}, "of which each has half"
    assert len(seen["test"]) == 3 + 4 + 2 and len(seen["train"]) == 3 + 11 + 13


@pytest.mark.parametrize("grid", [8, GRID])
def test_labels_of_patches(grid):
    for index in range(5):
        scene = make_scene("train", index, grid)
        glyph, colour, texture, centre, quadrant = scene.patches
        assert centre.sum() == len(scene.objects)
        for o, where in zip(scene.objects, scene.quadrants, strict=True):
            patch = int(o.y) // PATCH, int(o.x) // PATCH
            assert (glyph[patch], colour[patch]) == (o.glyph, o.colour)
            assert centre[patch] and quadrant[patch] == where
        for where, panel in enumerate(scene.panels):
            known = {*texture[quadrant == where].tolist()} - {NO_LABEL, len(TEXTURES)}
            assert panel < 0 or known <= {panel}
            assert (panel in known) or panel in (-1, len(TEXTURES))
        assert grid < GRID or min(scene.panels) >= 0, "a whole scene shows all panels"


@pytest.fixture(scope="module")
def small():
    model = AutoModelForImageTextToText.from_pretrained(SMALL_LLAVA, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(SMALL_LLAVA)


def asked_scene(index):
    scene = make_scene("test", index, seed=7)
    return scene, ask(scene, np.random.default_rng(index), 8)


HERE = Path(evaluate.__file__).parent
TEMPLATE = "<image> {question}"


@pytest.mark.parametrize("budget", [0, 32])
def test_many_questions_at_once_get_the_answers_of_each_alone(small, budget):
    model, processor = small
    scene, questions = asked_scene(0)
    image = Image.fromarray(scene.image)
    pruning = evaluate.Setting("hivtp", "cls", (1, 2), budget).apply(model)
    with pruning as h:
        together = answer(model, processor, image, questions, TEMPLATE)
        assert h is None or h.stats.kept == [budget]
        for question, said in zip(questions, together, strict=True):
            text = f"<image> {question.text}"
            inputs = processor(images=image, text=text, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            alone = processor.decode(out[0, inputs["input_ids"].shape[1] :], True)
            assert said == alone.strip()


@pytest.mark.parametrize(
    ("said", "kind", "read"),
    [
        ("yes", "existence", "yes"),
        ("No, there is not.", "existence", "no"),
        ("Top left.", "place", "top-left"),
        ("bottom-right", "place", "bottom-right"),
        ("Two letters", "count", "2"),
        ("There are no red letters", "count", "0"),
        ("12", "count", ""),
        ("The letter is Z.", "identity", "Z"),
        ('"H"', "identity", "H"),
        ("It is a photo, not waves", "background", "photo"),
        ("greenish", "colour", ""),
        ("", "colour", ""),
    ],
)
def test_answers_in_sentences_are_read(said, kind, read):
    assert evaluate.choice(said, kind) == read


def test_training_sees_what_the_model_sees(small):
    processor = small[1].image_processor
    trainee = train.Trainee(0).eval()
    scenes = [make_scene("train", index) for index in range(2)]
    asked = [ask(scene, np.random.default_rng(i), 3) for i, scene in enumerate(scenes)]
    logits = []
    trainee.llava.lm_head.register_forward_hook(lambda *call: logits.append(call[2]))
    with torch.no_grad():
        images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
        features, _ = trainee.see(images, torch.tensor([scene.offset for scene in scenes]))
        trainee.language_loss(features, train.pack(asked))
        packed = iter(logits[0])
        logits.clear()
        for scene, questions in zip(scenes, asked, strict=True):
            pixels = processor(Image.fromarray(scene.image), return_tensors="pt")["pixel_values"]
            for question in questions:
                words = train.encode(question.text)
                ids = torch.tensor([[train.BOS, *[small_llava.IMAGE] * GRID**2, *words]])
                alone = trainee.llava(input_ids=ids, pixel_values=pixels).logits[0, -1]
                torch.testing.assert_close(next(packed), alone, rtol=1e-4, atol=1e-4)


def test_training_shows_patches_in_any_order():
    features = torch.arange(40.0).reshape(2, 10, 2)
    mixed = train.shuffled(features)
    assert (mixed[0, :, 0] - mixed[1, :, 0]).unique().numel() > 1, "each image in its own"
    for one, whole in zip(mixed, features, strict=True):
        assert not one.equal(whole) and one[one[:, 0].argsort()].equal(whole)


def test_training_resumes(tmp_path, monkeypatch):
    stages = (
        train.Stage("see", 4, 2, False, 1.01, 0.5, 1e-3),
        train.Stage("answer", 4, 2, True, 1.01, 0.5, 1e-3, final=True),
    )
    monkeypatch.setattr(train, "STAGES", stages)
    train.train(tmp_path, 0, 6 / 60)
    state = torch.load(tmp_path / "state.pt")
    done = state["done"]
    assert state["finished"] and done["stage"] == 1 and done["total"] > 6
    train.train(tmp_path, 0, 6 / 60)
    assert torch.load(tmp_path / "state.pt")["done"] == done, "a finished run is left alone"
    with pytest.raises(ValueError, match="OUT must be empty or hold a run of"):
        train.train(tmp_path, 1, 6 / 60)
    # As if it had been interrupted halfway.
    done["total"] = done["in_stage"] = 3.0
    torch.save(state | {"finished": False}, tmp_path / "state.pt")
    train.train(tmp_path, 0, 6 / 60)
    resumed = torch.load(tmp_path / "state.pt")["done"]
    assert resumed["step"] > done["step"] and resumed["index"] > done["index"]
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert rows[-1]["stage"] == "answer"  # a line every 20 steps, so a slow machine logs no "see"
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    assert model.config.vision_config.image_size == GRID * PATCH


@pytest.mark.parametrize("folder", [SMALL_LLAVA, HERE / "small_llava_1", HERE / "small_llava_2"])
def test_a_checkpoint_is_small_and_right(folder):
    assert (folder / "model.safetensors").stat().st_size < 5e6
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert stock.dtype == torch.float16
    asked = [asked_scene(index) for index in range(25)]
    processor = AutoProcessor.from_pretrained(folder)
    right = evaluate.evaluate(stock.float(), processor, evaluate.Setting(), asked, TEMPLATE)
    assert right.mean() > 0.9


def test_the_checkpoint_in_a_pipeline(small):
    scene, questions = asked_scene(1)
    ask_it = pipeline("image-text-to-text", model=str(SMALL_LLAVA), dtype=torch.float32)
    content = [
        {"type": "image", "image": Image.fromarray(scene.image)},
        {"type": "text", "text": questions[0].text},
    ]
    out = ask_it(text=[{"role": "user", "content": content}], max_new_tokens=3)
    said = out[0]["generated_text"][-1]["content"].split()
    model, processor = small
    image = Image.fromarray(scene.image)
    assert [" ".join(said)] == answer(model, processor, image, questions[:1], TEMPLATE)


def test_paired_statistics():
    rng = np.random.default_rng(0)
    none = rng.normal(0, 1, 200)
    better = none + 0.5
    assert evaluate.sign_flip_p(better) < 0.001 < 0.05 < evaluate.sign_flip_p(none - none.mean())
    low, high = evaluate.interval(better)
    error = better.std() / 200**0.5
    assert abs(low - (better.mean() - 1.96 * error)) < 0.2 * error
    assert abs(high - (better.mean() + 1.96 * error)) < 0.2 * error
    assert evaluate.sign_flip_p(np.zeros(9)) == 1


def test_the_command(tmp_path, monkeypatch):
    command = ["evaluate", "--images", "3", "--jobs", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--what", "curve"])
    evaluate.main()
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert len(rows) == 3 + 6 * len(evaluate.BUDGETS)
    full, empty, *pruned = (float(row["accuracy"]) for row in rows[1:])
    assert full > 0.8 and full > empty and len({*pruned}) > 5
    assert (tmp_path / "curve.png").stat().st_size > 1e4
    assert {row["against"] for row in csv.DictReader((tmp_path / "paired.csv").open())} > {"full"}


def test_the_command_on_another_checkpoint(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    small_llava.save(small_llava.build(1), checkpoint)
    template = "USER: <image> answer in one word {question} ASSISTANT:"
    command = ["evaluate", "--model", str(checkpoint), "--template", template]
    command += ["--images", "2", "--what", "unpruned", "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", command)
    evaluate.main()
    rows = list(csv.DictReader((tmp_path / "out/curve.csv").open()))
    assert [row["method"] for row in rows] == ["chance", "full", "background"]
    assert [row["model"] for row in rows[1:]] == [str(checkpoint)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--template", "hello"], "--template must hold <image> once"),
        (["--template", "<image> Yes?"], "--template must hold <image> once"),
        (["--template", "{question} <image>"], "--template must hold <image> once"),
        (["--template", "<image> <image> {question}"], "--template must hold <image> once"),
        (["--template", "<image> {question} {x}"], "--template must hold <image> once"),
        (["--device", "abacus"], "--device must be one that torch can use here, got 'abacus'"),
        (["--model", "/no/where"], "--model must be a checkpoint's directory or Hub id"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_of_several_architectures_are_refused(tmp_path, monkeypatch, capsys):
    other = AutoConfig.from_pretrained(SMALL_LLAVA)
    other.vision_config.num_hidden_layers = 12
    other.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate", "--model", str(SMALL_LLAVA), str(tmp_path)])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "--model must be checkpoints of one architecture" in capsys.readouterr().err


def test_settings_and_their_opponents():
    config = AutoConfig.from_pretrained(SMALL_LLAVA)
    settings = evaluate.curve(config) + evaluate.variations(config)
    patches = [
        s._replace(window=PruneConfig(grid=(24, 24), budget=s.budget).window[0])
        if s.method == "hivtp" and not s.window
        else s
        for s in settings
    ]
    assert len({*patches}) == len(settings), "none is measured twice"
    assert {s.layers for s in evaluate.curve(config) if s.budget} == {(1, 2)}
    assert {s.layers for s in evaluate.variations(config)} == {(1,), (2,), (3,), (5,), (1, 2)}
    for setting in settings:
        others = evaluate.opponents(setting, (1, 2))
        assert {*others} <= {*settings} and setting not in others
        assert not setting.budget or others[0] == evaluate.Setting()
        assert {other.budget for other in others[1:]} <= {setting.budget}
        if setting.method == "hivtp":
            assert [o.method for o in others[1:4]] == ["random", "uniform", "topk"]
            assert others[3].layers == setting.layers and others[3].rows == setting.rows
        usual = setting.layers == (1, 2) and (setting.regions, setting.window) == (2, 0)
        assert usual or not setting.budget or others[-1].method == setting.method
    config.vision_config.image_size = 224  # 16 x 16: 288 tokens are more than there are
    assert {s.budget for s in evaluate.curve(config)} == {0, 192, 128, 64, 32}


def test_output_files(small, tmp_path, monkeypatch):
    settings = evaluate.curve(AutoConfig.from_pretrained(SMALL_LLAVA))
    assert len({(s.method, s.rows) for s in settings if s.budget}) == 6
    asked = [asked_scene(index) for index in range(8)]
    right = np.zeros((2, len(settings), 8, 8), dtype=bool)
    right[:, 0] = True  # unpruned is always right
    hivtp = settings.index(evaluate.Setting("hivtp", "cls", (1, 2), 128))
    right[0, hivtp, :, ::2] = right[1, hivtp, :, ::4] = True
    evaluate.write_curve(tmp_path / "curve.csv", ["a", "b"], settings, right, asked)
    rows = {
        (row["model"], row["method"], row["rows"], row["budget"]): row
        for row in csv.DictReader((tmp_path / "curve.csv").open())
    }
    assert float(rows["all", "full", "", "0"]["accuracy"]) == 1
    assert float(rows["b", "hivtp", "cls", "128"]["accuracy"]) == 0.25
    assert float(rows["all", "hivtp", "cls", "128"]["accuracy"]) == 0.375
    assert 0.1 < float(rows["", "chance", "", "0"]["accuracy"]) < 0.6
    evaluate.write_paired(tmp_path / "paired.csv", settings, right)
    paired = list(csv.DictReader((tmp_path / "paired.csv").open()))
    (row,) = [
        r for r in paired
        if (r["method"], r["rows"], r["budget"], r["against"]) == ("hivtp", "cls", "128", "random")
    ]  # fmt: skip
    assert float(row["difference"]) == 0.375 and 0.002 < float(row["p"]) < 0.05, "eight pairs"
    assert row["models_ahead"] == "2"
    evaluate.draw(tmp_path / "curve.png", settings, right)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 400
