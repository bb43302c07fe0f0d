"""All checks of the vLLM plugin, one after the other: `checks.py FOLDER`. See `run` beside it."""

import base64
import concurrent.futures
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from checkpoints import build, picture

WORK = Path(sys.argv[1]).resolve()
SIZES = ((480, 640), (300, 900), (700, 333), (336, 336), (1344, 336))
ARCHITECTURE = {
    "llava": "HivtpLlavaForConditionalGeneration",
    "llava_next": "HivtpLlavaNextForConditionalGeneration",
}
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(HERE),
}
results = []


def check(name, passed, detail=""):
    results.append((name, bool(passed)))
    print(f"{'ok  ' if passed else 'FAIL'} {name} {detail}", flush=True)


def overrides(kind, budget):
    return {"architectures": [ARCHITECTURE[kind]], "hivtp_budget": budget}


def request(text, *images, budget=None):
    return {"text": text, "images": images, "budget": budget}


def run(engine, name, kind, budget, requests, alone=(), **options):
    """The answers of an engine of its own process."""
    job = {
        "model": str(WORK / kind),
        "budget": budget,
        "requests": requests,
        "alone": alone,
        "options": {"hf_overrides": overrides(kind, budget), **options},
    }
    (WORK / f"{name}.job.json").write_text(json.dumps(job))
    started = time.time()
    with (WORK / f"{name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, HERE / "engine.py", engine, WORK / f"{name}.job.json",
             WORK / f"{name}.json"],
            stdout=log, stderr=log, env=ENVIRONMENT, check=True,
        )  # fmt: skip
    print(f"     {name}: {time.time() - started:.0f} s", flush=True)
    return json.loads((WORK / f"{name}.json").read_text())


def same(got, expected):
    """Equal tokens from prompts of equal length, log-probabilities to the last bits of fp32."""
    return len(got) == len(expected) and all(
        a.get("tokens") == b["tokens"]
        and a["prompt"] == b["prompt"]
        and abs(a["logprob"] - b["logprob"]) < 2e-3
        for a, b in zip(got, expected, strict=True)
    )


def llava():
    """LLaVA-1.5: budgets mixed in one batch and repeated, so that prefixes are cached; errors."""
    requests = [
        request("w7 w8 <image> w9 w10 w11", (1,)),
        request("w7 w8 <image> w9 w10 w11", (1,), budget=96),
        request("w7 w8 <image> w9 w10 w11", (1,), budget=0.5),
        request("w7 w8 <image> w9 w10 w11", (1,), budget=100000),
        request("w7 <image> w9 w10 w11", (2,)),
        request("w7 <image> w30 w31 <image> w9 w10 w11", (3,), (4,)),
        request("w7 w8 <image> w9 w10 w12", (1,)),
        request("w7 w8 <image> w9 w10 w12", (1,), budget=96),
    ]
    expected = run("transformers", "reference", "llava", 192, requests)
    illegal = [request("<image> w9", (1,), budget=b) for b in (1, -5, 0, True, "many")]
    alone = [*illegal, requests[0]]
    got = run("vllm", "one_rank", "llava", 192, requests, alone)
    lengths = [a["prompt"] for a in got[: len(requests)]]
    check("prompt token counts", lengths == [197, 101, 293, 581, 196, 390, 197, 101], lengths)
    check("LLaVA-1.5 equals hivtp_transformers", same(got[: len(requests)], expected))
    refused = got[len(requests) : -1]
    check(
        "illegal budgets are refused and named",
        all("budget" in a.get("error", "") for a in refused),
        [str(a.get("error", a))[:60] for a in refused],
    )
    check("and the engine lives on", same(got[-1:], expected[:1]))

    two = {"tensor_parallel_size": 2}
    got = run("vllm", "two_ranks", "llava", 192, requests, **two)
    check("two tensor-parallel ranks give the tokens of one", same(got, expected))
    got = run("vllm", "data_mode", "llava", 192, requests, mm_encoder_tp_mode="data", **two)
    check("so do they with mm_encoder_tp_mode=data", same(got, expected))
    got = run(
        "vllm", "unreduced", "llava", 192, requests, worker_extension_cls="unreduced.Extension",
        **two,
    )  # fmt: skip
    check("and do not without the all-reduce", not same(got, expected))
    return expected


def llava_next():
    """LLaVA-NeXT: five sizes, two budgets, and none."""
    requests = [
        request("w7 w8 <image> w9 w10 w11", (number, *size), budget=budget)
        for number, size in enumerate(SIZES)
        for budget in (None, 300)
    ]
    requests.append(request("w7 w8 <image> w9", (9, 480, 640), budget=100000))
    expected = run("transformers", "reference_next", "llava_next", 640, requests)
    got = run("vllm", "next", "llava_next", 640, requests)
    check("LLaVA-NeXT equals hivtp_transformers for five sizes", same(got, expected))
    lengths = {a["prompt"] for a in got[:-1]}
    check("with exact counts", lengths == {645, 305}, lengths)


def post(port, image, text, budget=None):
    """An answer of the server, or the HTTP status that it refuses with."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    body = {
        "model": str(WORK / "llava"),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    }
    if budget is not None:
        body["mm_processor_kwargs"] = {"hivtp_budget": budget}
    message = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(message, timeout=300) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code


def png(seed):
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


def server():
    """Two data-parallel engines behind one server, and clients some of which send nonsense."""
    texts = [f"w{20 + number} w9" for number in range(8)]
    budgets = [None, 96, None, 96, None, 400, None, 96]
    requests = [
        request(f"<image> {text}", (number,), budget=budget)
        for number, (text, budget) in enumerate(zip(texts, budgets, strict=True))
    ]
    expected = run("transformers", "reference_served", "llava", 192, requests)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (WORK / "server.log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(WORK / "llava"),
            "--port", str(port), "--hf-overrides", json.dumps(overrides("llava", 192)),
            "--data-parallel-size", "2", "--trust-request-mm-kwargs", "--dtype", "float32",
            "--enforce-eager", "--max-model-len", "2048",
        ],
        stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    try:
        started = time.time()
        while True:
            if process.poll() is not None or time.time() - started > 300:
                raise RuntimeError(f"the server did not start, see {WORK / 'server.log'}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        print(f"     server: {time.time() - started:.0f} s to start", flush=True)
        jobs = [(png(n), text, b) for n, (text, b) in enumerate(zip(texts, budgets, strict=True))]
        jobs.insert(2, (b"no picture at all", "w9", None))
        jobs.insert(5, (png(0), "w9", -7))
        with concurrent.futures.ThreadPoolExecutor(len(jobs)) as clients:
            replies = list(clients.map(lambda job: post(port, *job), jobs))
        broken, illegal = replies.pop(2), replies.pop(4)
        check("a malformed picture is refused", broken == 400, broken)
        check("an illegal budget is refused", illegal == 400, illegal)
        fine = all(isinstance(reply, dict) for reply in replies)
        lengths = fine and [reply["usage"]["prompt_tokens"] for reply in replies]
        check("served prompts have exact counts", lengths == [a["prompt"] for a in expected])
        said = fine and [reply["choices"][0]["message"]["content"].strip() for reply in replies]
        words = [" ".join(word(token) for token in a["tokens"]) for a in expected]
        check("nobody else is disturbed", said == words, "" if said == words else (said, words))
        again = post(port, png(0), texts[0])
        check("and the server lives on", isinstance(again, dict))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def word(token):
    return {0: "", 1: "", 2: "", 3: "<unk>"}.get(token, f"w{token}")


def batch():
    """A folder, in portions; the second call has nothing left to do but what is new."""
    folder, out = WORK / "pictures", WORK / "answers.jsonl"
    folder.mkdir(exist_ok=True)
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    command = [
        sys.executable, "-m", "hivtp_vllm.batch", str(folder), "--out", str(out),
        "--model", str(WORK / "llava"), "--prompt", "w9 w10", "--max-tokens", "4",
        "--portion", "3", "--hf-overrides", json.dumps(overrides("llava", 192)),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
    ]  # fmt: skip
    with (WORK / "batch.log").open("w") as log:
        for _ in range(2):
            subprocess.run(command, stdout=log, stderr=log, env=ENVIRONMENT, check=True)
            (folder / "3.png").exists() or picture(3).save(folder / "3.png")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = [line["image"] for line in lines]
    check(
        "a folder is answered once, and what is new later", names == [f"{n}.png" for n in range(4)]
    )
    check("with pruned prompts", {line.get("prompt_tokens") for line in lines} == {194}, lines[0])


def small():
    """The trained checkpoint that comes with the package, stock and pruned, on its own scene."""
    import hivtp_transformers

    checkpoint, folder = Path(hivtp_transformers.__file__).parent / "small_llava", WORK / "scene"
    folder.mkdir(exist_ok=True)
    (folder / "scene.png").write_bytes((checkpoint / "scene.png").read_bytes())
    question, right = next(iter(json.loads((checkpoint / "questions.json").read_text()).items()))
    pruned = overrides("llava", 288) | {"hivtp_layers": [1, 2]}
    for name, options in (("stock", {}), ("pruned", pruned)):
        out = WORK / f"scene_{name}.jsonl"
        out.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "hivtp_vllm.batch", str(folder), "--out", str(out),
            "--model", str(checkpoint), "--prompt", question, "--max-tokens", "2",
            "--hf-overrides", json.dumps(options), "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "1024",
        ]  # fmt: skip
        with (WORK / f"scene_{name}.log").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, env=ENVIRONMENT, check=True)
        line = json.loads(out.read_text())
        check(f"the small LLaVA, {name}, answers rightly", line["answer"].split() == [right], line)


if __name__ == "__main__":
    began = time.time()
    for kind in ARCHITECTURE:
        build(kind, WORK / kind)
    llava()
    llava_next()
    server()
    batch()
    small()
    print(f"\n{sum(ok for _, ok in results)} of {len(results)} checks passed "
          f"in {time.time() - began:.0f} s")  # fmt: skip
    sys.exit(not all(ok for _, ok in results))
