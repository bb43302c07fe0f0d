"""Shortening and restoring prompts by themselves, on small hand-made rows. 9 is an image token."""

import pytest
import torch
from hivtp_transformers.prompt import measure, restore, shorten


def short(ids, mask, kept, length, labels=None):
    ids, mask = torch.tensor(ids), None if mask is None else torch.tensor(mask)
    layout = measure(ids, mask, image_token=9)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return shorten(inputs, layout, torch.tensor(kept).bool(), length, pad_token=0)


def test_left_padding():
    out = short(
        [[0, 0, 1, 9, 9, 2], [3, 9, 9, 4, 5, 6]],
        [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
        kept=[0, 1, 1, 0],
        length=5,
    )
    assert out["input_ids"].tolist() == [[0, 0, 1, 9, 2], [3, 9, 4, 5, 6]]
    assert out["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_right_padding_and_labels():
    out = short(
        [[1, 9, 9, 2, 0, 0], [3, 9, 9, 4, 5, 6]],
        [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]],
        kept=[0, 0, 0, 1],
        length=5,
        labels=torch.tensor([[1, -100, -100, 2, -100, -100], [3, -100, -100, 4, 5, 6]]),
    )
    assert out["input_ids"].tolist() == [[1, 2, 0, 0, 0], [3, 9, 4, 5, 6]]
    assert out["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert out["labels"].tolist() == [[-100, 2, -100, -100, -100], [-100, -100, 4, 5, 6]]


def test_dropped_placeholders_never_pad():
    out = short([[1, 9, 9, 9], [2, 9, 9, 9]], None, kept=[1, 1, 1, 0, 0, 0], length=4)
    assert out["input_ids"].tolist() == [[1, 9, 9, 9], [0, 0, 0, 2]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]


def test_masked_token_between_others_stays():
    out = short([[0, 1, 2, 9, 9, 3]], [[0, 1, 0, 1, 1, 1]], kept=[0, 1], length=4)
    assert out["input_ids"].tolist() == [[1, 2, 9, 3]]
    assert out["attention_mask"].tolist() == [[1, 0, 1, 1]]


def test_masked_image_keeps_its_place_in_the_order():
    """Features are handed over for it, too, so it cannot go with the padding."""
    ids, mask = [[9, 9, 1, 9, 9, 2]], [[0, 0, 1, 1, 1, 1]]
    assert measure(torch.tensor(ids), torch.tensor(mask), image_token=9).lengths == [6]
    out = short(ids, mask, kept=[1, 0, 0, 1], length=4)
    assert out["input_ids"].tolist() == [[9, 1, 9, 2]]
    assert out["attention_mask"].tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("mask", "pads_right"),
    [(None, False), ([[1, 1, 1]], False), ([[0, 1, 1]], False), ([[1, 1, 0]], True)],
)
def test_layout(mask, pads_right):
    mask = None if mask is None else torch.tensor(mask)
    layout = measure(torch.tensor([[5, 6, 7]]), mask, image_token=9)
    assert layout.pads_right is pads_right
    assert layout.lengths == [3 if mask is None else int(mask.sum())]
    assert layout.placeholders == [0]


def test_restore():
    own = torch.tensor([[1, 9, 9, 2], [3, 9, 9, 4]])
    sequences = torch.tensor([[1, 9, 2, 50], [1, 9, 2, 51], [0, 3, 4, 52], [0, 3, 4, 53]])
    assert restore(sequences, own, length=3).tolist() == [
        [1, 9, 9, 2, 50],
        [1, 9, 9, 2, 51],
        [3, 9, 9, 4, 52],
        [3, 9, 9, 4, 53],
    ]
