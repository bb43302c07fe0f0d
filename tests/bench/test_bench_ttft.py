"""Flops, the published procedure, and what `bench.models.ttft` measures and reports."""

import csv
import itertools
import platform
from pathlib import Path

import hivtp_transformers
import numpy as np
import oracle
import pytest
import torch
from hivtp_transformers.pruner import Stopwatch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from bench.models import cases, flops, measure, published, report, ttft
from bench.ops import timing
from hivtp_kernels import PruneConfig

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SIZES = cases.TINY | {"num_hidden_layers": 3, "image_size": 32, "patch_size": 4}
VISION = CLIPVisionConfig(**SIZES, attn_implementation="eager")


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return CLIPVisionModel(VISION).eval()


def counted(call):
    """Flops of a call without the rotary angles, which transformers before 5.18 multiplies."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    angles = (ops for name, ops in counter.flop_counts.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - sum(sum(ops.values()) for ops in angles)


def test_vision_flops(tower):
    assert flops.vision_tower(VISION, images=2) == counted(lambda: tower(torch.randn(2, 3, 32, 32)))


def test_projector_flops():
    layers = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    assert flops.projector(32, 24, tokens=7) == counted(lambda: layers(torch.randn(7, 32)))


def test_prefill_flops():
    sizes = cases.llama(32, 40, 2, 4) | {"num_key_value_heads": 2, "vocab_size": 50}
    config = LlamaConfig(**sizes, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    assert flops.prefill(config, 9) == counted(
        lambda: model(torch.ones(1, 9, dtype=torch.long), logits_to_keep=1)
    )


def test_the_published_procedure_keeps_the_defined_patches(tower):
    pixels, layers, config = torch.randn(2, 3, 32, 32), (0, 2), PruneConfig(grid=(8, 8))
    with torch.no_grad():
        features = published.encode(tower, pixels, layers, grid=(8, 8))
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    for image in range(2):
        maps = np.stack([out.attentions[layer][image].double().numpy() for layer in layers])
        kept = np.flatnonzero(oracle.select(maps.mean((0, 1, 2))[1:], config))
        torch.testing.assert_close(features[image], out.hidden_states[-2][image, 1:][kept])


SHORT = cases.Case("short", cases.LLAVA, cases.llama(32, 48, 2, 2), 2, rounds=9, vision=cases.TINY)
CASES = [
    SHORT,
    SHORT._replace(name="scaled", batch=1, layers=8),
    SHORT._replace(name="next", model=cases.NEXT, batch=1),
    SHORT._replace(name="card", batch=1, methods=cases.GPU_METHODS, decoded=3, ttft_rounds=9),
    SHORT._replace(name="left out", rounds=0, why_not="not measured: takes too long"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The command on miniature models: its output, and its lines by case and method."""
    out = tmp_path_factory.mktemp("ttft")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.extend(map(str, words)))
        patch.setattr(timing, "load", lambda: "busy: a load")
        assert ttft.main(["--rounds", "2", "--out", str(out)], CASES) == 0
    assert (out / "ttft.png").stat().st_size > 10_000
    return "\n".join(printed), read(out)


def read(out):
    with (out / "ttft.csv").open(newline="") as file:
        return {(line["case"], line["method"]): line for line in csv.DictReader(file)}


def seconds(line, *fields):
    return [float(line[f"{field}_s"] or 0) for field in fields]


def test_every_case_has_every_method_or_a_reason(bench):
    printed, lines = bench
    assert list(lines) == [(case.name, method) for case in CASES for method in case.methods]
    assert "cannot run" in lines["next", "published"]["note"]
    assert "published               cannot run" in printed
    for (case, method), line in lines.items():
        assert tuple(line) == report.FIELDS
        assert "busy: a load" in line["machine"]
        if case == "left out":
            assert line["note"] == "not measured: takes too long" and not line["ttft_s"]
        elif (case, method) != ("next", "published"):
            assert line["rounds"] == "2" and float(line["decode_tokens_per_s"]) > 0
            assert float(line["requests_per_s"]) > 0
            assert ("2 layers measured, scaled to 8" in line["note"]) == (case == "scaled")
            assert bool(line["peak_mib"]) == (case != "scaled")
    assert "left out, batch 2, 0 rounds: not measured: takes too long" in printed
    assert "score, select and gather / time to first token" in printed


def test_budgets_are_per_tile(bench):
    _, lines = bench
    for method in cases.METHODS[4:]:
        budget = int(method.split()[1])
        assert lines["short", method]["visual_tokens"] == f"{budget}"
        assert lines["short", method]["prompt_tokens"] == f"{64 + budget}"
        assert lines["next", method]["visual_tokens"] == f"{5 * budget}"
    assert lines["short", cases.UNPRUNED]["visual_tokens"] == "576"
    assert lines["next", cases.UNPRUNED]["visual_tokens"] == "2928"


def test_stages_add_up_to_the_time_to_first_token(bench):
    _, lines = bench
    for (case, _), line in lines.items():
        if line["ttft_s"]:
            stages = seconds(line, *report.STAGES)
            assert min(stages) >= 0 and stages[0] > 0 and stages[-2] > 0
            # The median of two rounds is their mean, so stages add up.
            if case != "card":  # its time to first token comes from separate calls
                assert sum(stages) == pytest.approx(float(line["ttft_s"]), abs=2e-4)


def test_requests_count_whole_answers(bench):
    _, lines = bench
    decoded = {case.name: case.decoded for case in CASES}
    for (case, _), line in lines.items():
        if line["ttft_s"]:
            batch, speed = int(line["batch"]), float(line["decode_tokens_per_s"])
            whole = sum(seconds(line, *report.STAGES)) + batch * decoded[case] / speed
            assert float(line["requests_per_s"]) == pytest.approx(batch / whole, rel=5e-3)


def test_predictions_from_flops(bench):
    """Of ten layers the ninth is used; the unpruned and published towers run all ten."""
    _, lines = bench

    def cost(case, vision_layers, kept, images, layers):
        vision = CLIPVisionConfig(**cases.TINY | {"num_hidden_layers": vision_layers})
        text = LlamaConfig(**case.text | {"num_hidden_layers": layers})
        project = flops.projector(32, 32, images * kept)
        return flops.vision_tower(vision, images) + project + flops.prefill(text, 64 + kept, images)

    for case, images, layers in ((CASES[0], 2, 2), (CASES[1], 1, 8)):
        whole = cost(case, 10, 576, images, layers)
        base = float(lines[case.name, cases.UNPRUNED]["ttft_s"])
        for method, depth, kept in (("unpruned, eager", 10, 576), ("ours 64", 9, 64)):
            ratio = cost(case, depth, kept, images, layers) / whole
            assert float(lines[case.name, method]["predicted_ttft_s"]) == pytest.approx(
                ratio * base, abs=1e-4
            )


@pytest.fixture
def llava():
    model = cases.build(SHORT)
    return model, cases.ask(SHORT._replace(batch=3))


def test_flops_to_the_first_token_agree_with_torch(llava):
    model, inputs = llava
    model.set_attn_implementation("eager")

    def answer():
        model.generate(**inputs, max_new_tokens=1)

    unpruned = {"kept": [576] * 3, "vision_layers": 10}
    assert report.flops_to_first_token(model.config, 3, unpruned) == counted(answer)
    with hivtp_transformers.apply(model, budget=64):
        pruned = {"kept": [64] * 3, "vision_layers": 9}
        assert report.flops_to_first_token(model.config, 3, pruned) == counted(answer)


def test_the_published_procedure_gives_our_prompts_and_features(llava, monkeypatch):
    """With scores of all rows."""
    model, inputs = llava
    seen, generate = [], type(model).generate

    def spy(self, **given):
        seen.append(given)
        return generate(self, **given)

    monkeypatch.setattr(type(model), "generate", spy)
    sample = measure.contestants(model, inputs)[cases.PUBLISHED](1)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), hivtp_transformers.apply(model, rows="all") as handle:
        short = handle.compact(**inputs)
    assert sample["kept"] == handle.stats.kept and len(set(sample["kept"])) > 1
    ids, mask = (seen[0][name] for name in ("input_ids", "attention_mask"))
    assert torch.equal(mask, short["attention_mask"])
    assert torch.equal(ids * mask, short["input_ids"] * mask)
    theirs, ours = map(features, (seen[0], short))
    torch.testing.assert_close(theirs, ours)


def features(given):
    """The features given to the model; embeddings before transformers 5.18."""
    if "mm_encoder_outputs" in given:
        return torch.cat(given["mm_encoder_outputs"]["image"].pooler_output)
    return given["inputs_embeds"][given["input_ids"] == cases.IMAGE]


def test_the_probe_assigns_each_interval_to_its_stage(llava, monkeypatch):
    """A clock that ticks when it is read: at each hook, and at each lap of the handle."""
    model, inputs = llava
    clock = itertools.count()
    monkeypatch.setattr(measure.Probe, "now", lambda self: next(clock))
    monkeypatch.setattr(Stopwatch, "_now", lambda self: next(clock))
    runs = measure.contestants(model, inputs)
    samples = {name: runs[name](5) for name in (cases.UNPRUNED, cases.PUBLISHED, "ours")}
    # Ends of the used layer and, if it runs to the end, of the tower; per image if published.
    assert [sample["vit"] for sample in samples.values()] == [2, 6, 1]
    assert [sample["projector"] for sample in samples.values()] == [1, 3, 1]
    _, published, ours = samples.values()
    # Three hooks per image, and the lap.
    assert published["score_select"] == pytest.approx(3 * 3 + 1 - published["vit"])
    assert [ours[stage] for stage in ("score_select", "gather", "compact")] == pytest.approx(
        [1, 3 - ours["projector"], 1]
    )
    for sample in samples.values():
        assert (sample["layers"], sample["prefill"]) == (1, 3)
        assert sample["decode_layers"] == 5


@pytest.mark.parametrize("method", [cases.UNPRUNED, cases.PUBLISHED, "ours 64"])
def test_the_time_to_first_token_comes_from_an_uninterrupted_call(llava, monkeypatch, method):
    """On a GPU it synchronizes at the start and at the first token; with stages, in between too."""
    model, inputs = llava
    waits, profiled = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(Stopwatch, "_now", lambda self: profiled.append(self) or 0.0)
    probes = []
    make = measure.Probe.__init__

    def on_a_gpu(self, model):
        make(self, model)
        self._device = torch.device("cuda")
        probes.append(self)

    monkeypatch.setattr(measure.Probe, "__init__", on_a_gpu)
    run = measure.contestants(model, inputs)[method]
    assert set(run(0, stages=False)) <= {"ttft", "kept", "vision_layers"}
    assert waits == [probes[0]._device] * 2 and not profiled
    run(1)
    assert len(waits) > 8 and bool(profiled) == (method == "ours 64")


@pytest.mark.parametrize(
    ("method", "tower", "language"),
    [
        (cases.UNPRUNED, "sdpa", "sdpa"),
        ("unpruned, eager", "eager", "eager"),
        ("unpruned, eager tower", "eager", "sdpa"),
        (cases.PUBLISHED, "eager", "sdpa"),
        ("ours", "sdpa", "sdpa"),
    ],
)
def test_the_attention_of_each_method(llava, method, tower, language):
    model, inputs = llava
    measure.contestants(model, inputs)[method](0, stages=False)
    for part, attention in ((model.model.vision_tower, tower), (model, language)):
        config = getattr(part.config, "text_config", part.config)
        assert config._attn_implementation == attention


def test_models_have_their_dtype_and_answer_to_the_end():
    model = cases.build(SHORT, "cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # As in a checkpoint loaded in that dtype, and unlike `model.to`.
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    inputs = cases.ask(SHORT)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with hivtp_transformers.apply(model, budget=64):
        answer = model.generate(
            **inputs, max_new_tokens=33, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert len(answer.logits) == 33
    assert all(logits.isfinite().all() and logits.std() > 0 for logits in answer.logits)


def test_models_are_built_on_their_device():
    """Checked on a parameter from `torch.randn`: the suite replaces `torch.empty`."""
    model = cases.build(SHORT._replace(model=cases.NEXT), "meta")
    assert model.model.image_newline.device.type == "meta"


def test_gpu_cases_are_whole_models():
    assert [(case.name, case.batch) for case in cases.GPU] == [
        ("LLaVA-1.5 7B", 1), ("LLaVA-1.5 7B", 8), ("LLaVA-NeXT 7B", 1), ("LLaVA-NeXT 7B", 4),
    ]  # fmt: skip
    assert [case.batch for case in cases.GPU_QUICK] == [1]
    for case in cases.GPU:
        assert (case.text, case.vision) == (cases.llama(4096, 11008, 32, 32), cases.CLIP_L)
        assert case.layers is None and case.ttft_rounds >= 5 and case.decoded == 32


def test_a_rehearsal_runs_the_gpu_cases(tmp_path, monkeypatch):
    made, build = [], cases.build
    monkeypatch.setattr(cases, "build", lambda *given: made.append(given) or build(*given))
    assert ttft.main(["--rehearse", "--quick", "--out", str(tmp_path)]) == 0
    lines = read(tmp_path)
    assert list(lines) == [("LLaVA-1.5 7B", method) for method in cases.GPU_METHODS]
    for line in lines.values():
        assert line["machine"] == "rehearsal: the figures mean nothing" and line["ttft_s"]
    ((case, *where),) = made
    assert where == ["cpu", torch.bfloat16] and case.text["hidden_size"] == 32
    whole = cases.GPU_QUICK[0]
    assert (case.methods, case.decoded) == (whole.methods, whole.decoded) and case.ttft_rounds


def test_a_failure_is_a_line_with_its_reason(tmp_path, monkeypatch, capsys):
    """A method, a case, and a case's baseline fail; everything else is measured."""
    tried, build, generate = [], cases.build, cases.LLAVA[1].generate

    def encode(*_, **__):
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried 9 GiB")

    def no_memory(case, *where):
        if case.name == "broken":
            raise ValueError("no such model")
        model = build(case, *where)
        model.hopeless = case.name == "hopeless"
        return model

    def hopeless(self, **given):
        if self.hopeless and len(given["input_ids"][0]) > 600:
            raise RuntimeError("too long")
        return generate(self, **given)

    monkeypatch.setattr(published, "encode", encode)
    monkeypatch.setattr(cases, "build", no_memory)
    monkeypatch.setattr(cases.LLAVA[1], "generate", hopeless)
    methods = cases.UNPRUNED, cases.PUBLISHED, "ours 64"
    one = SHORT._replace(rounds=1, ttft_rounds=1, methods=methods, decoded=1)
    tried_cases = [one._replace(name=name) for name in ("broken", "hopeless", "short")]
    assert ttft.main(["--out", str(tmp_path)], tried_cases) == 1
    lines = read(tmp_path)
    assert list(lines) == [(case.name, method) for case in tried_cases for method in methods]
    notes = {key: line["note"] for key, line in lines.items()}
    memory = "failed: OutOfMemoryError: CUDA out of memory. Tried 9 GiB"
    assert {notes["broken", method] for method in methods} == {"failed: ValueError: no such model"}
    assert [notes["hopeless", method] for method in methods] == [
        "failed: RuntimeError: too long", memory, "failed: RuntimeError: too long",
    ]  # fmt: skip
    assert [notes["short", method] for method in methods] == ["", memory, ""]
    assert [bool(line["ttft_s"]) for line in lines.values()] == [False] * 6 + [True, False, True]
    assert len(tried) == 2  # once per case that was built
    printed, error = capsys.readouterr()
    assert memory in printed and "Traceback" in error


def test_a_run_that_measures_nothing(tmp_path):
    assert ttft.main(["--out", str(tmp_path)], CASES[-1:]) == 0
    assert not (tmp_path / "ttft.png").exists()


def test_a_short_language_model_is_scaled_by_its_layers():
    sample = {"ttft": 10.0, "prefill": 7.0, "layers": 6.0, "decode": 3.0, "decode_layers": 2.0}
    sample["vit"] = 1.0
    whole = {"ttft": 100.0, "prefill": 97.0, "decode": 33.0}
    assert measure.scaled(sample, built=2, layers=32) == sample | whole
    assert measure.scaled(sample, built=2, layers=2) == sample


def test_numbers_are_medians_and_ratios_within_a_round():
    base = [
        {"ttft": t, "vit": v, "kept": [576], "decode": 1.0} for t, v in ((4, 2), (8, 4), (2, 1))
    ]
    own = [
        {"ttft": t, "vit": 1.0, "score_select": 0.25, "gather": 0.25, "kept": [9, 12], "decode": d}
        for t, d in ((2.0, 2.0), (2.0, 2.5), (2.5, 1.0))
    ]
    line = report.numbers(
        measure.Times(own, [2.0, 2.5, 1.5, 3.5, 2.25], None),
        measure.Times(base, [5.0, 5.0, 5.0, 5.0, 5.0], None),
        decoded=8,
    )
    assert (line["visual_tokens"], line["prompt_tokens"]) == ("10.5", "76")
    assert [float(line[f"ttft{field}_s"]) for field in ("", "_low", "_high")] == [2.25, 1.5, 3.5]
    assert (line["of_unpruned"], line["vision_ratio"]) == ("0.450", "0.750")
    assert (line["pruning_share"], line["other_s"]) == ("0.25000", "0.50000")
    assert (line["decode_tokens_per_s"], line["rounds"]) == ("8.00", "5")
    assert line["requests_per_s"] == "0.5"  # two answers in 4 seconds, the median of whole calls


def test_the_verdict_is_on_the_worst_of_ours():
    def line(method, share, ratio):
        measured = {"pruning_share": share, "vision_ratio": ratio, "ttft_s": "1"}
        return {"case": "c", "batch": "1", "method": method} | measured

    lines = [line("ours", "0.00900", "0.990"), line("ours 64", "0.00100", "1.010")]
    lines += [line("published", "0.5", "2"), {"method": "ours", "note": "not measured"}]
    met, missed = report.verdict(lines).splitlines()
    assert met.startswith("met: score") and "at most 0.00900 (c, batch 1, ours)" in met
    assert missed.startswith("missed: vision") and "1.010 (c, batch 1, ours 64)" in missed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, Linux")
def test_peak_memory_of_a_call():
    held = torch.ones(2**24)
    result, peak = measure.with_peak(torch.device("cpu"), lambda: (held + 1).sum().item())
    assert result == 2**25 and 60 < peak < 80


def test_peak_memory_on_a_gpu_is_the_allocators(monkeypatch):
    device, held = torch.device("cuda"), {"now": 5 << 20, "peak": 99 << 20}

    def work():
        held["peak"] = max(held["peak"], 25 << 20)
        return "answer"

    def reset(_):
        held["peak"] = held["now"]

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: held["peak"])
    assert measure.with_peak(device, work) == ("answer", 20)


def test_the_committed_results_have_todays_fields():
    with (RESULTS / "ttft.csv").open(newline="") as file:
        lines = csv.DictReader(file)
        assert tuple(lines.fieldnames) == report.FIELDS
        for line in lines:
            assert bool(line["requests_per_s"]) == bool(line["ttft_s"])


@pytest.mark.parametrize(
    "arguments",
    [["--rounds", "0"], ["--device", "cuda"], ["--rehearse", "--device", "cuda"]],
)
def test_bad_arguments(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        ttft.main(arguments, [])
    assert arguments[0] in capsys.readouterr().err
