"""The folder batch with a stand-in for vLLM; `tests/plugins/serving/run` runs it with vLLM."""

import importlib.util
import json
from pathlib import Path

from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "batch.py"
spec = importlib.util.spec_from_file_location("batch", SCRIPT)
batch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(batch)


def stub_run_batch(monkeypatch, calls, broken=()):
    """Replace vLLM: answer each request except for the `broken` ones, and note its images."""

    def run(command, check):
        _, requests, _, outputs = command[command.index("-i") :][:4]
        names = [json.loads(line)["custom_id"] for line in Path(requests).read_text().splitlines()]
        calls.append(names)
        lines = []
        for name in names:
            line = {"custom_id": name, "response": {"body": {}}, "error": {"message": "no image"}}
            if name not in broken:
                choices = [{"message": {"content": f"of {name}"}}]
                line["response"]["body"] = {"choices": choices, "usage": {"prompt_tokens": 197}}
                line["error"] = None
            lines.append(json.dumps(line))
        Path(outputs).write_text("\n".join(lines))

    monkeypatch.setattr(batch.subprocess, "run", run)


def test_a_repeated_batch_asks_about_the_rest(tmp_path, monkeypatch):
    folder, out = tmp_path / "pictures", tmp_path / "answers.jsonl"
    (folder / "more").mkdir(parents=True)
    for name in ("b.png", "a.png", "more/c.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    calls = []
    stub_run_batch(monkeypatch, calls, broken=["b.png"])
    assert batch.run(folder, out, "m", "What?", 8, 2, []) == 1
    assert calls == [["a.png", "b.png"], ["more/c.png"]]
    stub_run_batch(monkeypatch, calls)
    assert batch.run(folder, out, "m", "What?", 8, 2, []) == 0
    assert calls[2:] == [["b.png"]]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["image"] for line in lines if "answer" in line] == ["a.png", "more/c.png", "b.png"]
    assert lines[0] == {"image": "a.png", "answer": "of a.png", "prompt_tokens": 197}
    assert lines[1]["error"] == {"message": "no image"}
