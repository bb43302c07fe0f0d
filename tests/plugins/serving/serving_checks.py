"""The vLLM plugin in vLLM: `tests/plugins/serving/run` runs this.

Every engine runs in processes of its own; its log is in the folder of the run.
"""

import base64
import concurrent.futures
import contextlib
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
from typing import NamedTuple

import hivtp_transformers
import pytest
import torch
from checkpoints import build, picture
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[2] / "examples"
TOKENS = 8
ARCHITECTURES = {
    "llava": "HivtpLlavaForConditionalGeneration",
    "llava_next": "HivtpLlavaNextForConditionalGeneration",
}
BUDGETS = {"llava": 192, "llava_next": 640}
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096}
# The same for the command line.
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
ALL = 100_000  # a budget of more than any image has: no pruning
TWO_RANKS = {"tensor_parallel_size": 2}


class Request(NamedTuple):
    """A text, its images as `(seed, height, width)`, and perhaps a budget of its own."""

    text: str
    images: tuple[tuple[int, ...], ...]
    budget: int | float | None = None


# Requests, and how long their prompts are in the end. Budgets differ within the batch and repeat,
# so that prefixes are cached.
LLAVA = {
    Request("w7 w8 <image> w9 w10 w11", ((1,),)): 197,
    Request("w7 w8 <image> w9 w10 w11", ((1,),), 96): 101,
    Request("w7 w8 <image> w9 w10 w11", ((1,),), 0.5): 293,
    Request("w7 w8 <image> w9 w10 w11", ((1,),), ALL): 581,
    Request("w7 <image> w9 w10 w11", ((2,),)): 196,
    Request("w7 <image> w30 w31 <image> w9 w10 w11", ((3,), (4,))): 390,
    Request("w7 w8 <image> w9 w10 w12", ((1,),)): 197,
    Request("w7 w8 <image> w9 w10 w12", ((1,),), 96): 101,
    Request("w7 w8 <image> w9 w10 w13", ((1,),), 1): 6,
    Request("w7 w8 <image> w9 w10 w14", ((1,),), 0.001): 6,
}
SIZES = ((480, 640), (300, 900), (700, 333), (336, 336), (1344, 336))
LEAST = 24 + 2  # of an image of 300 x 900: its newlines and one unit per grid
NEXT = {
    Request("w7 w8 <image> w9 w10 w11", ((number, *size),), budget): 5 + (budget or 640)
    for number, size in enumerate(SIZES)
    for budget in (None, 300)
} | {
    Request("w7 w8 <image> w9", ((9, 480, 640),), ALL): 3 + 2340,
    Request("w7 w8 <image> w9", ((1, 300, 900),), LEAST): 3 + LEAST,
    Request("w7 w8 <image> w9", ((1, 300, 900),), 0.001): 3 + LEAST,
}
SERVED = [
    Request(f"<image> w{20 + number} w9", ((number,),), budget)
    for number, budget in enumerate((None, 96, None, 96, None, 400, None, 96))
]
REFUSED = {"llava": (-5, 0, 0.0, 1.0, True, "many"), "llava_next": (-5, 1, LEAST - 1)}


def overrides(kind, **settings):
    """The value of `--hf-overrides`; `settings` as for `apply`."""
    named = {f"hivtp_{name}": value for name, value in settings.items()}
    return {"architectures": [ARCHITECTURES[kind]], "hivtp_budget": BUDGETS[kind], **named}


def environment(folder):
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
    }


def python(folder, log, *arguments):
    """Run a script; its output goes to the file `log`."""
    with (folder / log).open("a") as file:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            stdout=file, stderr=file, env=environment(folder), cwd=folder,
        )  # fmt: skip
    assert done.returncode == 0, (folder / log).read_text()[-5000:]


def answer(folder, name, kind, requests, alone=(), settings=None, **options):
    """The answers of an engine: to a batch of requests, then to single ones."""
    options |= {"model": str(folder / kind), "hf_overrides": overrides(kind, **settings or {})}
    options = ENGINE | options
    job, out = folder / f"{name}.job.json", folder / f"{name}.json"
    job.write_text(
        json.dumps(
            {
                "options": options,
                "requests": list(requests),
                "alone": alone,
                "tokens": TOKENS,
            }
        )
    )
    python(folder, f"{name}.log", HERE / "engine.py", job, out)
    answers = json.loads(out.read_text())
    return answers[: len(requests)], answers[len(requests) :]


@torch.no_grad()
def reference(folder, kind, requests, **settings):
    """The answers of `hivtp_transformers`, one request at a time."""
    model = AutoModelForImageTextToText.from_pretrained(folder / kind, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder / kind)
    answers = []
    for text, images, budget in requests:
        pictures = [picture(*numbers) for numbers in images]
        inputs = processor(images=pictures, text=text, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with hivtp_transformers.apply(model, budget=budget or BUDGETS[kind], **settings) as handle:
            out = model.generate(
                **inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                output_logits=True, return_dict_in_generate=True, eos_token_id=None,
            )  # fmt: skip
            pruned = handle.stats and handle.stats.prompt_after[0]
        tokens = out.sequences[0, length:]
        logits = torch.stack(out.logits)[:, 0]
        logprob = logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item()
        answers.append(
            {
                "prompt": pruned or length,
                "tokens": tokens.tolist(),
                "logprob": pytest.approx(logprob, abs=2e-3),
            }
        )
    return answers


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("serving")
    for kind in ARCHITECTURES:
        build(kind, folder / kind)
    return folder


@pytest.fixture(scope="session")
def expected(folder):
    return reference(folder, "llava", LLAVA)


@pytest.fixture(scope="session")
def expected_next(folder):
    return reference(folder, "llava_next", NEXT)


@pytest.fixture(scope="session")
def one_rank(folder):
    """Answers to all requests, and then to illegal ones and a legal one."""
    legal = next(iter(LLAVA))
    illegal = [legal._replace(budget=budget) for budget in REFUSED["llava"]]
    return answer(folder, "one_rank", "llava", LLAVA, [*illegal, legal])


@pytest.fixture(scope="session")
def next_engine(folder):
    """The same for LLaVA-NeXT."""
    legal = Request("w7 w8 <image> w9", ((1, 300, 900),), LEAST)
    illegal = [legal._replace(budget=budget) for budget in REFUSED["llava_next"]]
    return answer(folder, "next", "llava_next", NEXT, [*illegal, legal])


def prompts(answers):
    return [answer["prompt"] for answer in answers]


def test_prompts_have_exact_lengths(one_rank):
    assert prompts(one_rank[0]) == list(LLAVA.values())


def test_answers_equal_hivtp_transformers(one_rank, expected):
    assert one_rank[0] == expected


@pytest.mark.parametrize(("number", "budget"), enumerate(REFUSED["llava"]))
def test_an_illegal_budget_is_refused_and_named(one_rank, number, budget):
    error = one_rank[1][number]["error"]
    assert "budget must be" in error and error.endswith(f"got {budget!r}")


def test_the_engine_outlives_illegal_budgets(one_rank, expected):
    assert one_rank[1][-1] == expected[0]


def test_two_tensor_parallel_ranks_answer_as_one(folder, expected):
    assert answer(folder, "two_ranks", "llava", LLAVA, **TWO_RANKS)[0] == expected


def test_ranks_that_encode_whole_images_answer_as_one(folder, expected):
    options = TWO_RANKS | {"mm_encoder_tp_mode": "data"}
    assert answer(folder, "data_mode", "llava", LLAVA, **options)[0] == expected


def test_ranks_disagree_without_the_all_reduce(folder, expected):
    """The control: the tests above can fail. Only pruned requests are affected."""
    options = TWO_RANKS | {"worker_extension_cls": "unreduced.Extension"}
    answers, _ = answer(folder, "unreduced", "llava", LLAVA, **options)
    assert prompts(answers) == prompts(expected)
    wrong = [got != right for got, right in zip(answers, expected, strict=True)]
    pruned = [request.budget != ALL for request in LLAVA]
    assert any(wrong) and all(p for p, w in zip(pruned, wrong, strict=True) if w)


def test_next_prompts_have_exact_lengths(next_engine):
    assert prompts(next_engine[0]) == list(NEXT.values())


def test_next_answers_equal_hivtp_transformers(next_engine, expected_next):
    assert next_engine[0] == expected_next


@pytest.mark.parametrize(("number", "budget"), enumerate(REFUSED["llava_next"]))
def test_a_budget_too_small_for_the_image_is_refused_and_named(next_engine, number, budget):
    error = next_engine[1][number]["error"]
    assert "budget must be" in error and error.endswith(f"got {budget!r}")
    assert budget < 1 or f"at least {LEAST} for an image, which has 2328 visual positions" in error


def test_the_next_engine_outlives_illegal_budgets(next_engine, expected_next):
    assert next_engine[1][-1] == expected_next[-2]


def test_settings_of_the_engine_are_those_of_apply(folder):
    settings = {"layers": [1, 4], "rows": "all", "newline": "drop"}
    pruned = [request for request in NEXT if request.budget not in (LEAST, ALL)]
    whole = [request for request in NEXT if request.budget == ALL]
    answers, _ = answer(folder, "settings", "llava_next", pruned + whole, settings=settings)
    assert answers[:-1] == reference(folder, "llava_next", pruned, **settings)
    # An image that is not pruned keeps its newlines.
    assert answers[-1:] == reference(folder, "llava_next", whole)


@contextlib.contextmanager
def server(folder):
    """The port of a server with two data-parallel engines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder / "llava"),
                *("--port", str(port), "--hf-overrides", json.dumps(overrides("llava"))),
                *("--data-parallel-size", "2", "--trust-request-mm-kwargs", *OPTIONS),
            ],
            stdout=log, stderr=log, env=environment(folder), cwd=folder, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.time() + 400
        while not healthy(port):
            assert process.poll() is None and time.time() < end, (
                f"the server does not start:\n{(folder / 'server.log').read_text()[-5000:]}"
            )
            time.sleep(1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def post(folder, port, image, text, budget=None):
    """The server's answer, or the HTTP status of its refusal."""
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {
        "model": str(folder / "llava"),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    if budget is not None:
        body["mm_processor_kwargs"] = {"hivtp_budget": budget}
    message = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(message, timeout=300) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code


def png(seed):
    file = io.BytesIO()
    picture(seed).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def replies(folder):
    """What concurrent clients receive, two of which send nonsense, and one that comes later."""
    clients = [
        (png(request.images[0][0]), request.text.removeprefix("<image> "), request.budget)
        for request in SERVED
    ]
    nonsense = {"broken": (b"no image at all", "w9"), "illegal": (png(0), "w9", -7)}
    jobs = {**dict(enumerate(clients[:4])), **nonsense, **dict(enumerate(clients[4:], 4))}
    with server(folder) as port, concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        sent = {name: pool.submit(post, folder, port, *job) for name, job in jobs.items()}
        replies = {name: future.result() for name, future in sent.items()}
        return replies | {"later": post(folder, port, *clients[0])}


@pytest.fixture(scope="session")
def expected_served(folder):
    """Prompt length and words of each answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "llava")
    return [
        (answer["prompt"], tokenizer.decode(answer["tokens"], skip_special_tokens=True).split())
        for answer in reference(folder, "llava", SERVED)
    ]


def heard(reply):
    """The same of a reply."""
    return reply["usage"]["prompt_tokens"], reply["choices"][0]["message"]["content"].split()


@pytest.mark.parametrize("name", ["broken", "illegal"])
def test_the_server_refuses_nonsense(replies, name):
    assert replies[name] == 400


def test_the_server_answers_all_others_undisturbed(replies, expected_served):
    assert [heard(replies[number]) for number in range(len(SERVED))] == expected_served


def test_the_server_outlives_nonsense(replies, expected_served):
    assert heard(replies["later"]) == expected_served[0]


def batch(folder, name, pictures, model, settings, *options):
    """Run `examples/batch.py`; returns the lines it wrote so far."""
    out = folder / f"{name}.jsonl"
    python(
        folder, f"{name}.log", EXAMPLES / "batch.py", pictures, "--out", out, "--model", model,
        "--hf-overrides", json.dumps(settings), *OPTIONS, *options,
    )  # fmt: skip
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_batch_asks_once_about_each_image_of_a_folder(folder):
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(4):
        picture(number).save(pictures / f"{number}.png")
        if number < 2:
            continue
        options = ("--prompt", "w9 w10", "--max-tokens", "4")
        lines = batch(folder, "batch", pictures, folder / "llava", overrides("llava"), *options)
        assert [line["image"] for line in lines] == [f"{n}.png" for n in range(number + 1)]
        assert {line["prompt_tokens"] for line in lines} == {192 + 2}


@pytest.mark.parametrize(("name", "tokens"), [("stock", 576), ("pruned", 288)])
def test_the_small_llava_answers_correctly(folder, name, tokens):
    """The trained checkpoint of the examples, asked about its own scene."""
    small = EXAMPLES / "small_llava"
    question, right = next(iter(json.loads((small / "questions.json").read_text()).items()))
    settings = overrides("llava", budget=288) if name == "pruned" else {}
    options = ("--prompt", question, "--max-tokens", "2")
    (line,) = batch(folder, name, small, small, settings, *options)
    assert line["answer"].split() == [right]
    assert line["prompt_tokens"] == tokens + len(question.split())
