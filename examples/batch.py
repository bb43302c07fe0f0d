"""Ask one question about every image in a folder: `python examples/batch.py FOLDER --model ...`.

A thin wrapper around `vllm run-batch`, which loads the model on each call and writes its answers at
the end. Images are therefore sent in portions and the answers saved after each: an interrupted run
continues when the command is repeated. Unknown options are passed on to vLLM.
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def images(folder: Path) -> list[Path]:
    """The images in `folder` and its subfolders, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def answered(out: Path) -> set[str]:
    """Images with an answer in `out`; failed ones are asked about again."""
    if not out.exists():
        return set()
    lines = map(json.loads, out.read_text().splitlines())
    return {line["image"] for line in lines if "answer" in line}


def request(path: Path, name: str, model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    """One request in OpenAI's batch format."""
    kind = mimetypes.guess_type(path.name)[0]
    data = base64.b64encode(path.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}},
        {"type": "text", "text": prompt},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Parse the output of `vllm run-batch`: per image, an answer or the reason for none."""
    for line in map(json.loads, lines):
        body = (line["response"] or {}).get("body") or {}
        answer: dict[str, Any] = {"image": line["custom_id"]}
        if line["error"] is None and body.get("choices"):
            answer["answer"] = body["choices"][0]["message"]["content"]
            answer["prompt_tokens"] = body["usage"]["prompt_tokens"]
        else:
            answer["error"] = line["error"] or body
        yield answer


def run(
    folder: Path, out: Path, model: str, prompt: str, max_tokens: int, portion: int, vllm: list[str]
) -> int:
    """Append the missing answers to `out`, as JSON lines; returns the number of failed images."""
    found = images(folder)
    done = answered(out)
    left = [path for path in found if str(path.relative_to(folder)) not in done]
    failed = 0
    with tqdm(total=len(found), initial=len(found) - len(left), unit="image") as bar:
        for first in range(0, len(left), portion):
            paths = left[first : first + portion]
            with tempfile.TemporaryDirectory() as scratch:
                requests, outputs = Path(scratch, "in.jsonl"), Path(scratch, "out.jsonl")
                names = [str(path.relative_to(folder)) for path in paths]
                lines = [
                    json.dumps(request(path, name, model, prompt, max_tokens))
                    for path, name in zip(paths, names, strict=True)
                ]
                requests.write_text("\n".join(lines) + "\n")
                files = ["-i", str(requests), "-o", str(outputs)]
                command = ["run-batch", *files, "--model", model, *vllm]
                subprocess.run(
                    [sys.executable, "-m", "vllm.entrypoints.cli.main", *command], check=True
                )
                new = list(answers(iter(outputs.read_text().splitlines())))
            with out.open("a") as file:
                file.writelines(json.dumps(answer) + "\n" for answer in new)
            failed += sum("error" in answer for answer in new)
            bar.update(len(paths))
    return failed


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of images")
    parser.add_argument("--out", type=Path, default=Path("answers.jsonl"), help="JSON lines")
    parser.add_argument("--model", required=True, help="directory or Hub id")
    parser.add_argument("--prompt", default="Describe this image in one sentence.")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--portion", type=int, default=1000, help="images per call of vLLM")
    arguments, vllm = parser.parse_known_args()
    if not arguments.folder.is_dir():
        parser.error(f"FOLDER must be a folder of images, got {str(arguments.folder)!r}")
    if arguments.portion < 1:
        parser.error(f"--portion must be at least 1, got {arguments.portion}")
    failed = run(
        arguments.folder,
        arguments.out,
        arguments.model,
        arguments.prompt,
        arguments.max_tokens,
        arguments.portion,
        vllm,
    )
    if failed:
        sys.exit(f"{failed} images have no answer; see {arguments.out}")


if __name__ == "__main__":
    main()
