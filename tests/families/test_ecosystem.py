"""With PEFT, accelerate, pipelines, saving, and other models in the same process."""

import concurrent.futures
import filecmp

import hivtp_transformers
import peft
import pytest
import tiny_llava as tiny
import torch
from accelerate import cpu_offload, dispatch_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    pipeline,
)

from hivtp_kernels import PruneConfig

ADAPTER = {"r": 4, "lora_alpha": 16, "init_lora_weights": False}


def answer_pruned(model, inputs, **options):
    with hivtp_transformers.apply(model, **options):
        return tiny.answer(model, inputs)


def with_adapter(*modules):
    """A model with a seeded adapter, and the same weights merged into a plain model."""
    config = peft.LoraConfig(target_modules=list(modules), **ADAPTER)
    torch.manual_seed(11)
    wrapped = peft.get_peft_model(tiny.build(), config).eval()
    torch.manual_seed(11)
    merged = peft.get_peft_model(tiny.build(), config).merge_and_unload().eval()
    return wrapped, merged


@pytest.mark.parametrize("inside", [False, True], ids=["the wrapper", "the model inside"])
@pytest.mark.parametrize(
    "modules", [("q_proj", "k_proj", "v_proj"), ("linear_1", "down_proj")], ids=str
)
def test_peft(modules, inside):
    """Adapters on the tower's projections change the scores as merged weights do."""
    wrapped, merged = with_adapter(*modules)
    plain = answer_pruned(tiny.build(), tiny.three(), budget=100)
    expected = answer_pruned(merged, tiny.three(), budget=100)
    assert not torch.equal(plain, expected)  # else the adapter does nothing
    pixels = tiny.three()["pixel_values"]
    with hivtp_transformers.apply(merged, budget=100) as handle:
        scores = handle.scores(pixels)
    model = wrapped.get_base_model() if inside else wrapped
    with hivtp_transformers.apply(model, budget=100) as handle:
        assert torch.equal(tiny.answer(wrapped, tiny.three()), expected)
        assert handle.stats.kept == [100] * 4
        for own, wanted in zip(handle.scores(pixels), scores, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-6)
        with wrapped.disable_adapter():
            assert torch.equal(tiny.answer(wrapped, tiny.three()), plain)
    assert torch.equal(tiny.answer(wrapped, tiny.three()), tiny.answer(merged, tiny.three()))


def test_an_adapter_is_trained_through_pruning():
    wrapped, _ = with_adapter("linear_1", "linear_2")
    inputs = tiny.one()
    with hivtp_transformers.apply(wrapped, budget=100):
        wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = [p.grad for n, p in wrapped.named_parameters() if "lora_" in n]
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_a_second_apply_is_refused_through_the_wrapper():
    wrapped, _ = with_adapter("q_proj")
    with hivtp_transformers.apply(wrapped, budget=100):
        for model in (wrapped, wrapped.get_base_model()):
            with pytest.raises(RuntimeError, match="pruned already"):
                hivtp_transformers.apply(model, budget=50)


def test_dispatched_over_devices():
    """Between modules accelerate moves tensors, by hooks of its own."""
    expected = answer_pruned(tiny.build(), tiny.three())
    model = tiny.build()
    places = {name: "cpu" for name, _ in model.named_children()}
    dispatch_model(model, places, main_device="cpu", force_hooks=True)
    unpruned = tiny.answer(model, tiny.three())
    assert torch.equal(answer_pruned(model, tiny.three()), expected)
    assert torch.equal(tiny.answer(model, tiny.three()), unpruned)


def test_an_offloaded_language_model():
    expected = answer_pruned(tiny.build(), tiny.three())
    model = tiny.build()
    cpu_offload(model.model.language_model, "cpu")
    assert torch.equal(answer_pruned(model, tiny.three()), expected)


def test_an_offloaded_tower_is_refused():
    model = cpu_offload(tiny.build(), "cpu")
    with pytest.raises(ValueError, match=r"offloaded: pass a device_map"):
        hivtp_transformers.apply(model)


def test_a_checkpoint_with_a_device_map(tmp_path, model):
    expected = answer_pruned(model, tiny.three())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map="auto").eval()
    assert torch.equal(answer_pruned(loaded, tiny.three()), expected)


def processor():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": tiny.IMAGE_TOKEN}
    words |= {f"w{n}": n for n in range(3, tiny.VOCABULARY) if n != tiny.IMAGE_TOKEN}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="</s>", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    return LlavaProcessor(
        images, fast, patch_size=14, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip


def test_pipeline(model):
    pixels = (tiny.photos(1)[0] * 60 + 128).clamp(0, 255).byte().permute(1, 2, 0)
    photo, text = Image.fromarray(pixels.numpy()), "w7 <image> w8 w9"
    ask = pipeline("image-text-to-text", model=model, processor=processor(), device="cpu")
    settings = {"generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}

    def said():
        (out,) = ask(images=photo, text=text, return_full_text=False, **settings)
        return out["generated_text"].split()

    unpruned = said()
    inputs = processor()(images=photo, text=text, return_tensors="pt")
    with hivtp_transformers.apply(model, budget=100) as handle:
        pruned = said()
        assert handle.stats.kept == [100]
        expected = tiny.answer(model, inputs)
    assert pruned == processor().tokenizer.decode(expected[0]).split() != unpruned
    assert said() == unpruned


def test_what_is_saved_is_the_unchanged_model(tmp_path, model):
    model.save_pretrained(tmp_path / "before")
    with hivtp_transformers.apply(model, budget=100):
        model.save_pretrained(tmp_path / "pruned")
        tiny.answer(model, tiny.one())
        model.save_pretrained(tmp_path / "after a call")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "model.safetensors" in names and "config.json" in names
    for folder in ("pruned", "after a call"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
        same, *_ = filecmp.cmpfiles(tmp_path / "before", tmp_path / folder, names, shallow=False)
        assert same == names
    loaded = type(model).from_pretrained(tmp_path / "pruned").eval()
    assert torch.equal(tiny.answer(loaded, tiny.one()), tiny.answer(model, tiny.one()))


def test_models_pruned_differently_answer_at_the_same_time():
    """Each in a thread of its own, again and again."""
    settings = [{}, {"budget": 100}, {"config": PruneConfig(regions=(4, 4), ratio=0.1)}]
    settings += [{"budget": 50, "method": "topk"}]
    pruned = [(tiny.build(seed=seed % 3), options) for seed, options in enumerate(settings)]
    handles = [hivtp_transformers.apply(model, **options) for model, options in pruned]
    expected = [tiny.answer(model, tiny.three()) for model, _ in pruned]
    kept = [handle.stats.kept for handle in handles]
    assert len(set(map(tuple, kept))) == len(kept)
    with concurrent.futures.ThreadPoolExecutor(len(pruned)) as threads:
        for _ in range(3):
            jobs = [threads.submit(tiny.answer, model, tiny.three()) for model, _ in pruned]
            for job, wanted in zip(jobs, expected, strict=True):
                assert torch.equal(job.result(), wanted)
    assert [handle.stats.kept for handle in handles] == kept
    handles[1].remove()
    assert torch.equal(tiny.answer(pruned[0][0], tiny.three()), expected[0])
