"""The model `hivtp_llava_hf` in the real `lmms-eval` command: `tests/plugins/lmms_eval/run`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import hivtp_transformers
import pytest
import tiny_llava
import torch
from checkpoints import KINDS, build
from hivtp_lmms_eval.model import HivtpLlava
from PIL import Image
from skimage import data
from transformers import AutoModelForImageTextToText, AutoProcessor

QUESTIONS = ("w17 w205 w44", "w3", "w98 w12 w391 w55 w8", "w77 w6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that lmms-eval runs in: photos with questions, and a checkpoint per family."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    photos = [data.astronaut()[:480], data.coffee(), data.cat(), data.rocket()]
    documents = {
        "image": [Image.fromarray(photo) for photo in photos],
        "question": list(QUESTIONS),
        "answer": ["w5"] * len(photos),
    }
    dataset = datasets.Dataset.from_dict(documents).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": dataset}).save_to_disk(folder / "photos")
    for family in KINDS:
        build(family, folder / family)
    return folder


def command(folder, model, arguments, out):
    """Run the command as a user would."""
    return subprocess.run(
        [
            str(Path(sys.executable).parent / "lmms-eval"),
            *("--model", model, "--model_args", arguments),
            *("--include_path", str(Path(__file__).parent / "tiny_vqa"), "--tasks", "tiny_vqa"),
            *("--output_path", str(out), "--log_samples"),
        ],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def evaluate(folder):
    """A function that returns the answers and the results of a run; equal runs happen once."""
    runs = {}

    def run(family="llava", model="hivtp_llava_hf", **options):
        key = (family, model, *sorted(options.items()))
        if key not in runs:
            pairs = {"pretrained": folder / family, "device": "cpu", **options}
            out = folder / f"out{len(runs)}"
            done = command(folder, model, ",".join(f"{k}={v}" for k, v in pairs.items()), out)
            found = list(out.rglob("*_results.json"))
            assert len(found) == 1, done.stdout
            (samples,) = out.rglob("*_samples_tiny_vqa.jsonl")
            lines = map(json.loads, samples.read_text().splitlines())
            answers = {line["doc_id"]: line["filtered_resps"] for line in lines}
            runs[key] = (
                [answers[i] for i in range(len(QUESTIONS))],
                json.loads(found[0].read_text()),
            )
        return runs[key]

    return run


@torch.no_grad()
def direct(folder, family="llava", **options):
    """The answers and the mean number of visual tokens, without lmms-eval."""
    model = AutoModelForImageTextToText.from_pretrained(folder / family).eval()
    processor = AutoProcessor.from_pretrained(folder / family)
    answers, kept = [], []
    for row in datasets.load_from_disk(folder / "photos")["test"]:
        with hivtp_transformers.apply(model, **options) as handle:
            text = f"<image> {row['question']} "
            inputs = processor(images=row["image"], text=text, return_tensors="pt")
            out = tiny_llava.answer(model, inputs, 8, eos_token_id=2, pad_token_id=2)
            answers.append(processor.decode(out[0], skip_special_tokens=True))
            kept += handle.stats.kept
    return answers, sum(kept) / len(kept)


def visual_tokens(results):
    return results["throughput"]["avg_visual_tokens"]


@pytest.mark.parametrize("family", KINDS)
def test_unpruned_answers_are_those_of_llava_hf(evaluate, family):
    answers, results = evaluate(family, method="none")
    assert answers == evaluate(family, "llava_hf", device_map="cpu")[0]
    assert len(set(map(str, answers))) == len(QUESTIONS)
    assert results["results"]["tiny_vqa"]["words,none"] > 0


def test_a_budget_of_all_patches_changes_nothing(evaluate):
    unpruned, before = evaluate(method="none")
    answers, after = evaluate(budget=576)
    assert answers == unpruned
    assert visual_tokens(before) == visual_tokens(after) == 576


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llava", {}),
        ("llava", {"budget": 64}),
        ("llava", {"budget": 64, "method": "uniform"}),
        ("llava", {"budget": 0.25, "layers": [3, 5], "rows": "all", "backend": "torch"}),
        ("llava_next", {}),
        ("llava_next", {"budget": 0.2, "newline": "drop"}),
    ],
)
def test_pruned_answers_are_those_of_apply(evaluate, folder, family, options):
    written = {name: str(value).replace(" ", "") for name, value in options.items()}
    answers, results = evaluate(family, **written)
    expected, kept = direct(folder, family, **options)
    assert answers == expected
    assert visual_tokens(results) == kept < visual_tokens(evaluate(family, method="none")[1])
    assert answers != evaluate(family, method="none")[0]


def test_methods_leave_results_to_compare(evaluate):
    ours, results = evaluate(budget=64)
    uniform, others = evaluate(budget=64, method="uniform")
    assert ours != uniform
    assert visual_tokens(results) == visual_tokens(others) == 64
    assert "method=uniform" in others["config"]["model_args"]
    assert "method" not in results["config"]["model_args"]


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("llava", "budget=0", "budget must be"),
        # Only the image shows this, where lmms-eval would go on with an empty answer.
        ("llava_next", "budget=30", "budget must be"),
    ],
)
def test_an_error_ends_the_run_without_results(folder, tmp_path, family, arguments, message):
    done = command(
        folder, "hivtp_llava_hf", f"pretrained={family},device=cpu,{arguments}", tmp_path
    )
    assert f"Error: {message}" in done.stdout
    assert not list(tmp_path.rglob("*.json*")), "there are results"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("budget=-3", ValueError, "budget must be"),
        ("budget=many", TypeError, "budget must be"),
        ("layers=[6,99]", ValueError, "layers must be"),
        ("layers=six", TypeError, "layers must be"),
        ("method=best", ValueError, "method must be one of none, hivtp, topk"),
        ("method=topk", ValueError, "budget must be given with method='topk'"),
        ("method=none,budget=64", ValueError, "budget must be absent with method='none'"),
        ("newline=drop", ValueError, "newline must be 'keep' for llava"),
    ],
)
def test_bad_arguments_are_refused_by_name(folder, arguments, error, message):
    text = f"pretrained={folder / 'llava'},device=cpu,{arguments}"
    with pytest.raises(error, match=message):
        HivtpLlava.create_from_arg_string(text, {"batch_size": 1})


def test_options_of_llava_hf_reach_it_and_loglikelihood_is_refused(folder):
    options = {"device": "cpu", "dtype": "bfloat16", "attn_implementation": "eager"}
    model = HivtpLlava(pretrained=str(folder / "llava"), budget=64, **options)
    assert model.model.dtype == torch.bfloat16
    assert model.model.config._attn_implementation == "eager"
    with pytest.raises(NotImplementedError, match="loglikelihood tasks need method=none"):
        model.loglikelihood([])
    with pytest.raises(ValueError, match="batch_size must be 1, .* got 2"):
        HivtpLlava(pretrained=str(folder / "llava"), batch_size=2, **options)
