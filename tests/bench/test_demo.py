"""The demo end to end: the small LLaVA that comes with it, and a checkpoint on disk."""

import sys

import numpy as np
import pytest
import tiny_llava
from hivtp_transformers import demo
from hivtp_transformers.__main__ import main
from PIL import ExifTags, Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast


def image_processor():
    return CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    monkeypatch.setattr(demo, "DECODED", 2)


TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
)


@pytest.fixture(params=[None, TEMPLATE], ids=["plain", "chat"])
def checkpoint(request, tmp_path):
    """A directory that `AutoProcessor` and `from_pretrained` read: a tiny LLaVA-1.5."""
    words = ["<pad>", "<unk>", *(f"word{i}" for i in range(498)), "<image>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            unk_token="<unk>",
            additional_special_tokens=["<image>"],
            model_input_names=["input_ids", "attention_mask"],
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=request.param,
    )
    directory = tmp_path / "checkpoint"
    processor.save_pretrained(directory)
    tiny_llava.build().save_pretrained(directory)
    return directory


def pictures(out):
    with Image.open(out / "overlay.png") as picture:
        assert min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 10, "the picture shows something"


def answers(printed):
    """Question to its columns: unpruned, pruned and, of the demo's own scene, right."""
    lines = [line for line in printed.splitlines() if " ?  " in line]
    return {line.partition(" ?  ")[0]: line.partition(" ?  ")[2].split() for line in lines}


def test_its_own_scene(quick, tmp_path, capsys):
    main(["demo", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for stage in ("visual tokens", *demo.STAGES):
        assert stage in printed
    asked = answers(printed)
    assert len(asked) >= 6 and {len(columns) for columns in asked.values()} == {3}
    unpruned, pruned = (sum(c[i] == c[2] for c in asked.values()) for i in range(2))
    assert unpruned >= len(asked) - 1, "a trained model of 95 % that sees the scene"
    assert pruned >= len(asked) - 2
    pictures(tmp_path)


def test_photo_and_budget(quick, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(photo)
    main(["demo", str(photo), "--budget", "64", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    (tokens,) = [line for line in printed.splitlines() if "visual" in line]
    assert tokens.split()[2:4] == ["576", "64"]
    assert {len(columns) for columns in answers(printed).values()} == {2}, "none is called right"
    pictures(tmp_path / "out")


def test_checkpoint(quick, checkpoint, tmp_path, capsys):
    main(["demo", "--model", str(checkpoint), "--budget", "0.25", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "unpruned: word" in printed
    with Image.open(tmp_path / "out" / "overlay.png") as picture:
        assert picture.width < 2200, "long answers go over several lines"
    assert "pruned:   word" in printed
    pictures(tmp_path / "out")


def test_a_photo_is_turned_as_its_camera_was_held(tmp_path):
    photo = Image.new("RGB", (20, 10))
    photo.getexif()[ExifTags.Base.Orientation] = 6
    photo.save(tmp_path / "turned.jpg", exif=photo.getexif())
    assert demo._open(str(tmp_path / "turned.jpg")).size == (10, 20)


def test_a_photo_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match="PHOTO must be an image that Pillow reads"):
        demo._open(str(tmp_path / "bomb.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "PHOTO must be an image that Pillow reads, got 'missing.jpg'"),
        ([__file__], "PHOTO must be an image that Pillow reads"),
        (["--device", "abacus"], "--device must be one that torch can use here, got 'abacus'"),
        (["--device", "cuda:99"], "--device must be one that torch can use here, got 'cuda:99'"),
        (["--model", "/no/where"], "--model must be a checkpoint's directory or Hub id, got '/no"),
        (["--budget", "1"], "budget must be at least 2"),
        (["--budget", "576"], "--budget must be less than all patches"),
        (["--budget", "many"], "must be a number of patches or a share such as 0.33, got 'many'"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(quick, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not list(tmp_path.iterdir())


def test_model_of_another_type(quick, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(SystemExit):
        main(["demo", "--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "--model must be of type llava, got 'qwen2_5_vl'" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["skimage", "matplotlib"])
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ModuleNotFoundError(name=__name__)", "is not installed"),
        ("raise OSError('libgone.so: cannot open')", "does not load: OSError: libgone.so: cannot"),
    ],
)
def test_what_the_demo_needs_is_said_first(monkeypatch, tmp_path, capsys, package, code, reason):
    for name in [*sys.modules]:
        if name.split(".")[0] == package or name in ("hivtp_transformers.demo", "hivtp_transformers.overlay"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("hivtp_transformers.demo")
    monkeypatch.delattr("hivtp_transformers.overlay")
    (tmp_path / f"{package}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert f'pip install "hivtp_kernels[demo]": {package} {reason}' in line
    assert not printed.out and not (tmp_path / "out").exists()


def test_a_package_that_breaks_in_the_middle_is_one_line(monkeypatch, tmp_path, capsys):
    def run(*_):
        raise ImportError("CLIPImageProcessor requires the Torchvision library\nInstall it.")

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "requires the Torchvision library Install it." in line
