import csv
import itertools

import hivtp_llava
import numpy as np
import oracle
import pytest
import torch
from hivtp_llava import families
from hivtp_llava.pruner import Stopwatch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from bench import flops, published, timing, ttft
from hivtp_kernels import PruneConfig

VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=4,
    attn_implementation="eager",
)


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return CLIPVisionModel(VISION).eval()


def counted(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_vision_flops(tower):
    assert flops.vision_tower(VISION, images=2) == counted(lambda: tower(torch.randn(2, 3, 32, 32)))


def test_projector_flops():
    layers = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    assert flops.projector(32, 24, tokens=7) == counted(lambda: layers(torch.randn(7, 32)))


def test_prefill_flops():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    assert flops.prefill(config, 9) == counted(
        lambda: model(torch.ones(1, 9, dtype=torch.long), logits_to_keep=1)
    )


def test_the_published_procedure_keeps_what_the_definition_keeps(tower):
    pixels, layers, config = torch.randn(2, 3, 32, 32), (0, 2), PruneConfig(grid=(8, 8))
    with torch.no_grad():
        features = published.encode(tower, pixels, layers, grid=(8, 8))
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    for image in range(2):
        maps = np.stack([out.attentions[layer][image].double().numpy() for layer in layers])
        kept = np.flatnonzero(oracle.select(maps.mean((0, 1, 2))[1:], config))
        torch.testing.assert_close(features[image], out.hidden_states[-2][image, 1:][kept])


TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 10, "num_attention_heads": 2,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip
SHORT = ttft.Case("short", ttft.LLAVA, ttft.llama(32, 48, 2, 2), batch=2, rounds=9, vision=TINY)
CASES = [
    SHORT,
    SHORT._replace(name="scaled", batch=1, layers=8),
    SHORT._replace(name="next", model=ttft.NEXT, batch=1),
    SHORT._replace(name="left out", rounds=0, why_not="not measured: takes too long"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What the command prints and writes of miniature models: text, and lines by case, method."""
    out = tmp_path_factory.mktemp("ttft")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.extend(map(str, words)))
        patch.setattr(timing, "load", lambda: "busy: told so")
        ttft.main(["--rounds", "2", "--out", str(out)], CASES)
    assert (out / "ttft.png").stat().st_size > 10_000
    with (out / "ttft.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    return "\n".join(printed), {(line["case"], line["method"]): line for line in lines}


def seconds(line, *fields):
    return [float(line[f"{field}_s"] or 0) for field in fields]


def test_every_case_has_every_method_or_says_why_not(bench):
    printed, lines = bench
    assert list(lines) == [(case.name, method) for case in CASES for method in ttft.METHODS]
    assert "cannot run" in lines["next", "published"]["note"]
    assert "published        cannot run" in printed
    for (case, method), line in lines.items():
        assert tuple(line) == ttft.FIELDS
        assert "busy: told so" in line["machine"]
        if case == "left out":
            assert line["note"] == "not measured: takes too long" and not line["ttft_s"]
        elif (case, method) != ("next", "published"):
            assert line["rounds"] == "2" and float(line["decode_tokens_per_s"]) > 0
            assert ("2 layers measured, scaled to 8" in line["note"]) == (case == "scaled")
            assert bool(line["peak_mib"]) == (case != "scaled")
    assert "left out, batch 2, 0 rounds: not measured: takes too long" in printed
    assert "score, select and gather / time to first token" in printed


def test_budgets_are_of_a_tile(bench):
    _, lines = bench
    for method in ttft.METHODS[4:]:
        budget = int(method.split()[1])
        assert lines["short", method]["visual_tokens"] == f"{budget}"
        assert lines["short", method]["prompt_tokens"] == f"{64 + budget}"
        assert lines["next", method]["visual_tokens"] == f"{5 * budget}"
    assert lines["short", ttft.UNPRUNED]["visual_tokens"] == "576"
    assert lines["next", ttft.UNPRUNED]["visual_tokens"] == "2928"


def test_stages_make_up_the_time_to_first_token(bench):
    _, lines = bench
    for line in lines.values():
        if line["ttft_s"]:
            stages = seconds(line, *ttft.STAGES)
            assert min(stages) >= 0 and stages[0] > 0 and stages[-2] > 0
            # Of two rounds the median is the mean, so that stages add up.
            assert sum(stages) == pytest.approx(float(line["ttft_s"]), abs=2e-4)


def test_what_the_flop_count_predicts(bench):
    """The used layer is the ninth of ten; an unpruned and the published model run all ten."""
    _, lines = bench

    def cost(case, vision_layers, kept, images, layers):
        vision = CLIPVisionConfig(**TINY | {"num_hidden_layers": vision_layers})
        text = LlamaConfig(**case.text | {"num_hidden_layers": layers})
        project = flops.projector(32, 32, images * kept)
        return flops.vision_tower(vision, images) + project + flops.prefill(text, 64 + kept, images)

    for case, images, layers in ((CASES[0], 2, 2), (CASES[1], 1, 8)):
        whole = cost(case, 10, 576, images, layers)
        base = float(lines[case.name, ttft.UNPRUNED]["ttft_s"])
        for method, depth, kept in (("unpruned, eager", 10, 576), ("ours 64", 9, 64)):
            ratio = cost(case, depth, kept, images, layers) / whole
            assert float(lines[case.name, method]["predicted_ttft_s"]) == pytest.approx(
                ratio * base, abs=1e-4
            )


@pytest.fixture
def llava():
    model = ttft.build(SHORT)
    return model, ttft.ask(SHORT._replace(batch=3), families.adapt(model))


def test_flops_to_the_first_token_are_those_that_torch_counts(llava):
    model, inputs = llava
    model.set_attn_implementation("eager")

    def answer():
        model.generate(**inputs, max_new_tokens=1)

    unpruned = {"kept": [576] * 3, "vision_layers": 10}
    assert ttft.flops_to_first_token(model.config, 3, unpruned) == counted(answer)
    with hivtp_llava.apply(model, budget=64):
        pruned = {"kept": [64] * 3, "vision_layers": 9}
        assert ttft.flops_to_first_token(model.config, 3, pruned) == counted(answer)


def test_the_published_procedure_answers_what_ours_does(llava, monkeypatch):
    """With the scores of all rows: the same patches, prompts and features."""
    model, inputs = llava
    seen, generate = [], type(model).generate

    def spy(self, **given):
        seen.append(given)
        return generate(self, **given)

    monkeypatch.setattr(type(model), "generate", spy)
    sample = ttft.contestants(model, inputs)[ttft.PUBLISHED]()
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), hivtp_llava.apply(model, rows="all") as handle:
        short = handle.compact(**inputs)
    assert sample["kept"] == handle.stats.kept and len(set(sample["kept"])) > 1
    ids, mask = (seen[0][name] for name in ("input_ids", "attention_mask"))
    assert torch.equal(mask, short["attention_mask"])
    assert torch.equal(ids * mask, short["input_ids"] * mask)
    theirs, ours = (s["mm_encoder_outputs"]["image"].pooler_output for s in (seen[0], short))
    for features, expected in zip(theirs, ours, strict=True):
        torch.testing.assert_close(features, expected)


def test_the_probe_books_each_interval_on_its_stage(llava, monkeypatch):
    """A clock that ticks when it is read: once at each hook, and once a lap of the handle's."""
    model, inputs = llava
    clock = itertools.count()
    for watch in (ttft.Probe, Stopwatch):
        monkeypatch.setattr(watch, "_now", lambda self: next(clock))
    runs = ttft.contestants(model, inputs)
    samples = {name: runs[name]() for name in (ttft.UNPRUNED, ttft.PUBLISHED, "ours")}
    # The layer that is used, and the tower where it runs to its end: image by image if published.
    assert [sample["vit"] for sample in samples.values()] == [2, 6, 1]
    assert [sample["projector"] for sample in samples.values()] == [1, 3, 1]
    _, published, ours = samples.values()
    # Three hooks an image, the start of the probe's own clock, the lap.
    assert published["score_select"] == pytest.approx(3 * 3 + 1 + 1 - published["vit"])
    assert [ours[stage] for stage in ("score_select", "gather", "compact")] == pytest.approx(
        [1, 3 - ours["projector"], 1]
    )
    for sample in samples.values():
        assert (sample["layers"], sample["prefill"]) == (1, 3)
        assert sample["decode_layers"] == ttft.DECODED


def test_a_short_language_model_is_scaled_by_its_layers():
    sample = {"ttft": 10.0, "prefill": 7.0, "layers": 6.0, "decode": 3.0, "decode_layers": 2.0}
    sample["vit"] = 1.0
    whole = {"ttft": 100.0, "prefill": 97.0, "decode": 33.0}
    assert ttft.scaled(sample, built=2, layers=32) == sample | whole
    assert ttft.scaled(sample, built=2, layers=2) == sample


def test_numbers_are_medians_and_ratios_within_a_round():
    base = [
        {"ttft": t, "vit": v, "kept": [576], "decode": 1.0} for t, v in ((4, 2), (8, 4), (2, 1))
    ]
    own = [
        {"ttft": t, "vit": 1.0, "score_select": 0.25, "gather": 0.25, "kept": [9, 12], "decode": 2}
        for t in (2.0, 2.0, 2.5)
    ]
    line = ttft.numbers(own, base)
    assert (line["visual_tokens"], line["prompt_tokens"]) == ("10.5", "76")
    assert [float(line[f"ttft{field}_s"]) for field in ("", "_low", "_high")] == [2.0, 2.0, 2.5]
    assert (line["of_unpruned"], line["vision_ratio"]) == ("0.500", "0.750")
    assert (line["pruning_share"], line["other_s"]) == ("0.25000", "0.50000")
    assert (line["decode_tokens_per_s"], line["rounds"]) == ("8.00", "3")


def test_the_verdict_is_on_the_worst_of_ours():
    def line(method, share, ratio):
        measured = {"pruning_share": share, "vision_ratio": ratio, "ttft_s": "1"}
        return {"case": "c", "batch": "1", "method": method} | measured

    lines = [line("ours", "0.00900", "0.990"), line("ours 64", "0.00100", "1.010")]
    lines += [line("published", "0.5", "2"), {"method": "ours", "note": "not measured"}]
    met, missed = ttft.verdict(lines).splitlines()
    assert met.startswith("met: score") and "at most 0.00900 (c, batch 1, ours)" in met
    assert missed.startswith("missed: vision") and "1.010 (c, batch 1, ours 64)" in missed


@pytest.mark.skipif(not hasattr(ttft.ctypes.CDLL(None), "malloc_trim"), reason="needs glibc, Linux")
def test_peak_memory_is_what_the_call_had_at_most():
    held = torch.ones(2**24)
    result, peak = ttft.with_peak(torch.device("cpu"), lambda: (held + 1).sum().item())
    assert result == 2**25 and 60 < peak < 80


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--device", "cuda"]])
def test_bad_arguments(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        ttft.main(arguments, [])
    assert arguments[0] in capsys.readouterr().err
