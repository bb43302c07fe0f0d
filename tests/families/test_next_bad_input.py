"""Every refusal names the argument, its value and what is legal, before any work is done."""

import hivtp_transformers
import pytest
import tiny_llava
import tiny_llava_next as reference
import torch
from tiny_llava_next import POSITIONS, inputs_of, one

from hivtp_kernels import PruneConfig


@pytest.fixture(scope="module")
def next_model():
    return reference.build()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"newline": "no"}, ValueError, "newline must be 'keep' or 'drop', got 'no'"),
        ({"config": PruneConfig(budget=192)}, ValueError, r"ratio mode .* budget=192\)"),
        ({"config": PruneConfig(), "budget": 9}, ValueError, "config and budget exclude"),
        ({"config": PruneConfig(grid=(8, 8))}, ValueError, r"tile \(24, 24\), got \(8, 8\)"),
        ({"budget": True}, TypeError, "budget must be a positive integer, .* got True"),
        ({"budget": "half"}, TypeError, "budget must be a positive integer, .* got 'half'"),
        ({"budget": 0}, ValueError, "budget must be a positive integer, .* got 0"),
        ({"budget": 1.5}, ValueError, "strictly between 0 and 1, got 1.5"),
    ],
)
def test_arguments(next_model, arguments, error, message):
    with pytest.raises(error, match=message):
        hivtp_transformers.apply(next_model, **arguments)
    with pytest.raises(error, match=message):
        hivtp_transformers.token_count(next_model, [(480, 640)], **arguments)


def test_newlines_of_a_model_without(model):
    with pytest.raises(ValueError, match="newline must be 'keep' for llava, .* got 'drop'"):
        hivtp_transformers.apply(model, newline="drop")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_sizes": None}, r"image_sizes must hold \(height, width\) .* got None"),
        ({"image_sizes": torch.tensor([[0, 5]])}, "image_sizes must hold .* positive integers"),
        ({"image_sizes": torch.tensor([480, 640])}, "image_sizes must hold"),
        ({"image_sizes": torch.tensor([[480, 640]])}, r"pixel_values must hold \[5\] tiles"),
        ({"image_sizes": torch.tensor([[300, 900]] * 2)}, r"hold \[4, 4\] tiles for the 2 images"),
        ({"pixel_values": torch.zeros(3, 3, 336, 336)}, r"hold \[4\] tiles .* got \(3, 3, 336"),
        ({"pixel_values": torch.zeros(3, 336, 336)}, r"pixel_values must be .* got \(3, 336, 336"),
        ({"pixel_values": [1]}, r"pixel_values must be .* got list"),
        (tiny_llava.batch([tiny_llava.prompt()]), r"2328 placeholders .* got \[576\]"),
        ({"input_ids": None}, "input_ids must be a tensor .* got None"),
        ({"position_ids": torch.zeros(1, 1)}, "position_ids must be None"),
    ],
)
def test_inputs(next_model, refuses, changes, message):
    refuses(next_model, {**one(), **changes}, message)


def test_images_across_rows(next_model):
    """Right in total, wrong by row."""
    inputs = inputs_of([(336, 336)], [(336, 336)])
    inputs["input_ids"][0, 20], inputs["input_ids"][1, -1] = 5, tiny_llava.IMAGE_TOKEN
    with (
        hivtp_transformers.apply(next_model),
        pytest.raises(ValueError, match=r"got \[1175, 1177\]"),
    ):
        next_model(**inputs)


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("size", POSITIONS, ids=lambda size: f"{size[0]}x{size[1]}")
def test_smallest_budget_is_named_and_works(next_model, monkeypatch, size, newline):
    with hivtp_transformers.apply(next_model, budget=1, newline=newline) as handle:
        monkeypatch.setattr(handle._pruner.tower, "encode", lambda _: pytest.fail("worked first"))
        with pytest.raises(ValueError, match="budget must be at least") as raised:
            next_model.generate(**one(size))
    smallest = int(str(raised.value).split()[5])
    assert hivtp_transformers.token_count(next_model, [size], budget=smallest, newline=newline)
    with pytest.raises(ValueError, match=f"at least {smallest} for"):
        hivtp_transformers.token_count(next_model, [size], budget=smallest - 1, newline=newline)
    with hivtp_transformers.apply(next_model, budget=smallest, newline=newline) as handle:
        handle.compact(**one(size))
    assert handle.stats.kept == [smallest]


def test_share_too_small_for_an_image_is_the_smallest_count(next_model):
    """One tall image must not fail a batch at a share that is legal for the others."""
    sizes = [(480, 640), (3000, 300)]
    counts = hivtp_transformers.token_count(next_model, sizes, budget=0.01)
    for size, count in zip(sizes, counts, strict=True):
        with pytest.raises(ValueError, match=f"at least {count} for"):
            hivtp_transformers.token_count(next_model, [size], budget=count - 1)
    with hivtp_transformers.apply(next_model, budget=0.01) as handle:
        handle.compact(**inputs_of([(480, 640), (700, 333)]))
    wanted = hivtp_transformers.token_count(next_model, [(480, 640), (700, 333)], budget=0.01)
    assert handle.stats.kept == wanted


def test_grid_too_large_for_one_selection():
    config = tiny_llava.configure(
        reference.LlavaNextConfig, image_grid_pinpoints=[[336 * 3, 336 * 3]]
    )
    positions = 576 + 72 * 72 + 72
    with pytest.raises(ValueError, match=r"at least 74 .*24 x 24 and 72 x 72 units, 72 newlines"):
        hivtp_transformers.token_count(config, [(900, 900)], budget=73)
    assert hivtp_transformers.token_count(config, [(900, 900)], budget=1000) == [1000]
    assert hivtp_transformers.token_count(config, [(900, 900)], budget=positions) == [positions]
    assert hivtp_transformers.token_count(config, [(900, 900)]) == [10 * 288 + 72]
