"""The demo end to end, with the small LLaVA that it ships with and with other checkpoints."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from bench.accuracy import small_llava

SCRIPT = Path(__file__).parents[2] / "examples" / "demo.py"
spec = importlib.util.spec_from_file_location("demo", SCRIPT)
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    monkeypatch.setattr(demo, "DECODED", 2)


@pytest.fixture(params=["plain", "chat"])
def checkpoint(request, tmp_path):
    """A directory with an untrained LLaVA-1.5, with or without a chat template."""
    directory = tmp_path / "checkpoint"
    model = small_llava.build(1)
    model.generation_config.eos_token_id = None  # so that answers are long
    small_llava.save(model, directory)
    if request.param == "plain":
        (directory / "chat_template.jinja").unlink()
    return directory


def pictures(out):
    with Image.open(out / "overlay.png") as picture:
        assert min(picture.size) > 500
        assert np.asarray(picture.convert("L")).std() > 10, "the picture shows something"


def answers(printed):
    """The columns of each question: unpruned, pruned and, for the demo's own scene, right."""
    lines = [line for line in printed.splitlines() if " ?  " in line]
    return {line.partition(" ?  ")[0]: line.partition(" ?  ")[2].split() for line in lines}


def test_its_own_scene(quick, tmp_path, capsys):
    demo.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for stage in ("visual tokens", *demo.STAGES):
        assert stage in printed
    asked = answers(printed)
    assert len(asked) >= 6 and {len(columns) for columns in asked.values()} == {3}
    unpruned, pruned = (sum(c[i] == c[2] for c in asked.values()) for i in range(2))
    assert unpruned >= len(asked) - 1, "the model is right about 95 % of such questions"
    assert pruned >= len(asked) - 2
    pictures(tmp_path)


def test_photo_and_budget(quick, tmp_path, capsys):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)).save(photo)
    demo.main([str(photo), "--budget", "64", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    (tokens,) = [line for line in printed.splitlines() if "visual" in line]
    assert tokens.split()[2:4] == ["576", "64"]
    assert {len(columns) for columns in answers(printed).values()} == {2}, (
        "no right answers are known"
    )
    pictures(tmp_path / "out")


def test_checkpoint(quick, checkpoint, tmp_path, capsys):
    demo.main(["--model", str(checkpoint), "--budget", "0.25", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    for name in ("unpruned: ", "pruned:   "):
        (line,) = [line for line in lines if line.startswith(name)]
        assert len(line.split()) > 10
    with Image.open(tmp_path / "out" / "overlay.png") as picture:
        assert picture.width < 2200, "long answers are wrapped"
    pictures(tmp_path / "out")


def test_a_photo_is_rotated_as_its_camera_was_held(tmp_path):
    photo = Image.new("RGB", (20, 10))
    photo.getexif()[ExifTags.Base.Orientation] = 6
    photo.save(tmp_path / "turned.jpg", exif=photo.getexif())
    assert demo._open(str(tmp_path / "turned.jpg")).size == (10, 20)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
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
        (["--budget", "0"], "budget must be a positive integer"),
        (["--budget", "576"], "--budget must be less than all patches"),
        (["--budget", "many"], "must be a number of patches or a share such as 0.33, got 'many'"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(quick, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        demo.main([*arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not list(tmp_path.iterdir())


def test_model_of_another_type(quick, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    with pytest.raises(SystemExit):
        demo.main(["--model", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "--model must be of type llava, got 'qwen2_5_vl'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "code", "reason"),
    [
        ("skimage", "raise ModuleNotFoundError(name=__name__)", "is not installed"),
        ("matplotlib", "raise OSError('no libx.so')", "does not load: OSError: no libx.so"),
        ("transformers", "raise OSError('no libx.so')", "does not load: OSError: no libx.so"),
    ],
)
def test_a_missing_or_broken_package_is_one_line(tmp_path, package, code, reason):
    (tmp_path / f"{package}.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 2 and not out.stdout and not (tmp_path / "out").exists()
    (line,) = out.stderr.splitlines()
    assert line.endswith(f'the demo needs pip install "hivtp_kernels[demo]": {package} {reason}')


def test_a_package_that_breaks_in_the_middle_is_one_line(monkeypatch, tmp_path, capsys):
    def run(*_):
        raise ImportError("CLIPImageProcessor requires the Torchvision library\nInstall it.")

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "requires the Torchvision library Install it." in line
